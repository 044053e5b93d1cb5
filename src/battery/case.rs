//! One call of a backend, and its comparison with the reference.

use half::{bf16, f16};

use super::compare::{RELATIVE, Worst, gradient_floor, gradient_within, overflows, ties};
use super::sparse::{Kept, Values};
use super::{Aligned, Bounds};
use crate::{
    Batch, Dtype, Elements, ElementsMut, Logits, LogitsMut, Objective, Output, Result, Strides,
    Teacher, reference,
};

pub(super) type Backend<'a> = dyn Fn(&Objective, &Batch, Logits, LogitsMut) -> Result<Output> + 'a;

/// Logits of one of the three dtypes.
pub(super) enum Tensor {
    F32(Aligned<f32>),
    F16(Aligned<f16>),
    Bf16(Aligned<bf16>),
}

impl Tensor {
    pub fn new(dtype: Dtype, values: impl Iterator<Item = f32>) -> Self {
        match dtype {
            Dtype::F32 => Self::F32(values.collect()),
            Dtype::F16 => Self::F16(values.map(f16::from_f32).collect()),
            Dtype::Bf16 => Self::Bf16(values.map(bf16::from_f32).collect()),
        }
    }

    pub fn elements(&self) -> Elements<'_> {
        match self {
            Self::F32(v) => (&v[..]).into(),
            Self::F16(v) => (&v[..]).into(),
            Self::Bf16(v) => (&v[..]).into(),
        }
    }

    fn elements_mut(&mut self) -> ElementsMut<'_> {
        match self {
            Self::F32(v) => (&mut v[..]).into(),
            Self::F16(v) => (&mut v[..]).into(),
            Self::Bf16(v) => (&mut v[..]).into(),
        }
    }
}

/// One call of a backend.
#[derive(Clone)]
pub(super) struct Case {
    pub name: String,
    pub objective: Objective,
    pub vocab: usize,
    pub teacher: Vec<f32>,
    pub student: Vec<f32>,
    /// Empty for none at all.
    pub labels: Vec<i64>,
    pub sequences: Option<Vec<usize>>,
    pub margins: Option<Vec<f32>>,
    pub hard: Option<Vec<bool>>,
    pub token_weights: Option<Vec<f32>>,
    pub temperatures: Option<Vec<f32>>,
    pub teacher_dtype: Dtype,
    pub student_dtype: Dtype,
    pub gradient_dtype: Dtype,
    /// Elements between the rows, and before the first.
    pub padding: usize,
    /// For teacher, student and gradient: every `INNER` rows are followed by a gap that is longer than a row.
    pub nested: [bool; 3],
    /// The teacher is sparse, and this is what is left of its logits.
    pub sparse: Option<Kept>,
}

/// Rows of one outer index, where there are any.
const INNER: usize = 3;
pub(super) const TEACHER: usize = 0;
pub(super) const STUDENT: usize = 1;
pub(super) const GRADIENT: usize = 2;

pub(super) const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// The value between the rows, which must stay there.
const PADDING: f32 = 13.0;

pub(super) fn random(tokens: usize, vocab: usize, seed: u64) -> Case {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut logits = || -> Vec<f32> {
        (0..tokens * vocab).map(|_| 4.0 * (0..4).map(|_| random.f32() - 0.5).sum::<f32>()).collect()
    };
    let (teacher, student) = (logits(), logits());
    let labels = (0..tokens).map(|_| random.i64(0..vocab as i64)).collect();
    Case {
        name: String::new(),
        objective: Objective::default(),
        vocab,
        teacher,
        student,
        labels,
        sequences: None,
        margins: None,
        hard: None,
        token_weights: None,
        temperatures: None,
        teacher_dtype: Dtype::F32,
        student_dtype: Dtype::F32,
        gradient_dtype: Dtype::F32,
        padding: 0,
        nested: [false; 3],
        sparse: None,
    }
}

impl Case {
    pub fn tokens(&self) -> usize {
        self.teacher.len() / self.vocab
    }

    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    pub fn with(mut self, objective: Result<Objective>) -> Self {
        self.objective = objective.expect("the battery's objectives are valid");
        self
    }

    pub fn dtypes(mut self, teacher: Dtype, student: Dtype, gradient: Dtype) -> Self {
        (self.teacher_dtype, self.student_dtype, self.gradient_dtype) =
            (teacher, student, gradient);
        self
    }

    /// The starts of a matrix's rows; no gap is a multiple of 16 bytes with its rows.
    pub fn strides(&self, matrix: usize) -> Strides {
        let row = self.vocab + self.padding;
        match self.nested[matrix] {
            true => Strides::nested(INNER, (INNER + 1) * row + 1, row),
            false => row.into(),
        }
    }

    /// The elements before the first row, so that no two matrices start alike after a multiple of 128 bytes.
    fn first(&self, matrix: usize, dtype: Dtype) -> usize {
        self.padding + matrix * 16 / dtype.size()
    }

    /// `values` with the padding in place.
    fn tensor(&self, matrix: usize, dtype: Dtype, values: &[f32]) -> Tensor {
        let (first, strides) = (self.first(matrix, dtype), self.strides(matrix));
        let mut elements = vec![PADDING; first + strides.start(self.tokens()) + self.padding];
        for (i, row) in values.chunks(self.vocab).enumerate() {
            elements[first + strides.start(i)..][..self.vocab].copy_from_slice(row);
        }
        Tensor::new(dtype, elements.into_iter())
    }

    fn view<'a>(&self, matrix: usize, tensor: &'a Tensor) -> Result<Logits<'a>> {
        let elements = tensor.elements();
        let elements = elements.slice(self.first(matrix, elements.dtype())..elements.len());
        Logits::strided(elements, self.tokens(), self.vocab, self.strides(matrix))
    }

    pub fn run(&self, bounds: Bounds, backend: &Backend) -> Worst {
        self.compare(bounds, backend).unwrap_or_else(|error| Worst::fail(format!("error: {error}")))
    }

    fn compare(&self, bounds: Bounds, backend: &Backend) -> Result<Worst> {
        let (tokens, vocab, objective) = (self.tokens(), self.vocab, &self.objective);
        let teacher = self.tensor(TEACHER, self.teacher_dtype, &self.teacher);
        let student = self.tensor(STUDENT, self.student_dtype, &self.student);
        let mut gradient = self.tensor(GRADIENT, self.gradient_dtype, &vec![99.0; tokens * vocab]);
        let sparse = self.sparse.map(|kept| Values::of(self, kept));
        let teacher = match &sparse {
            Some(values) => Teacher::Sparse(values.teacher(tokens, vocab)?),
            None => Teacher::Dense(self.view(TEACHER, &teacher)?),
        };
        let batch = match self.labels.is_empty() {
            true => Batch::unlabelled(teacher),
            false => Batch::new(teacher, &self.labels)?,
        };
        let batch = match &self.sequences {
            Some(offsets) => batch.with_sequences(offsets)?,
            None => batch,
        };
        let batch = match &self.margins {
            Some(margins) => batch.with_margins(margins)?,
            None => batch,
        };
        let batch = match &self.hard {
            Some(hard) => batch.with_hard(hard)?,
            None => batch,
        };
        let batch = match &self.token_weights {
            Some(weights) => batch.with_token_weights(weights)?,
            None => batch,
        };
        let batch = match &self.temperatures {
            Some(temperatures) => batch.with_temperatures(temperatures)?,
            None => batch,
        };
        let student = self.view(STUDENT, &student)?;
        let mut elements = gradient.elements_mut();
        let end = elements.as_ref().len();
        let strides = self.strides(GRADIENT);
        let first = self.first(GRADIENT, self.gradient_dtype);
        let view = LogitsMut::strided(elements.slice(first..end), tokens, vocab, strides)?;
        let output = backend(objective, &batch, student, view)?;
        let (exact, exact_gradient) = reference::forward_backward(objective, &batch, student)?;

        let mut worst = Worst::none();
        let temperatures = match &self.temperatures {
            Some(own) => own.iter().map(|&t| t.into()).collect(),
            None => vec![objective.temperature()],
        };
        let [coldest, hottest] = [f64::min, f64::max]
            .map(|of| temperatures.iter().copied().reduce(of).unwrap_or(objective.temperature()));
        let squared = if objective.temperature_squared() { hottest.powi(2) } else { 1.0 };
        let weights = self.token_weights.iter().flatten().filter(|weight| weight.is_finite());
        let heaviest = f64::from(weights.fold(1.0_f32, |most, weight| most.max(weight.abs())));
        let unit = squared.max(1.0) * heaviest;
        let logits = self.teacher.iter().chain(&self.student).filter(|z| z.is_finite());
        let largest = logits.fold(0.0_f32, |largest, z| largest.max(z.abs()));
        // The loss may be that of one token, which a logit far below the others makes.
        let relative = if largest <= 50.0 { RELATIVE } else { 2e-6 };
        worst.add_output(&output, &exact, relative, unit);
        if worst.ratio.is_infinite() {
            return Ok(worst);
        }

        // The floor is over the objective's temperature.
        let scale = objective.distillation_scale_at(hottest) + objective.ce_weight();
        let weight = heaviest * scale * objective.temperature() / coldest;
        let floor = gradient_floor(objective, weight, &exact)
            * match bounds {
                Bounds::Cpu => 1.0,
                Bounds::Kernels => 2.0,
            };
        let ties = ties(objective, &batch, student, &exact)?;
        let elements = gradient.elements();
        let mut outside = vec![true; elements.len()];
        for (i, (exact, ties)) in exact_gradient.chunks(vocab).zip(ties.chunks(vocab)).enumerate() {
            let largest = exact.iter().fold(0.0_f64, |largest, g| largest.max(g.abs()));
            let start = first + strides.start(i);
            outside[start..start + vocab].fill(false);
            let mut sum = 0.0;
            for (j, (&exact, tie)) in exact.iter().zip(ties).enumerate() {
                let actual = f64::from(elements.get(start + j));
                sum += actual;
                let end = exact.abs() + tie;
                let allowed = tie + gradient_within(self.gradient_dtype, end, largest, floor);
                if actual == exact.signum() * f64::INFINITY
                    && overflows(self.gradient_dtype, exact, allowed)
                {
                    continue;
                }
                worst.add(|| format!("gradient[{i}, {j}]"), actual, exact, allowed);
            }
            // If the loss is infinite the limit of the gradient need not sum to 0.
            let finite = output.tokens[i].loss.is_finite()
                && !exact.iter().any(|&g| overflows(Dtype::F32, g, 0.0));
            if self.gradient_dtype == Dtype::F32 && finite {
                // Rounding of each element, and what the floor allows the row as a whole.
                let total: f64 = exact.iter().map(|g| g.abs()).sum();
                worst.add(|| format!("sum of gradient[{i}]"), sum, 0.0, RELATIVE * total + floor);
            }
        }
        for (i, _) in outside.iter().enumerate().filter(|(_, outside)| **outside) {
            let name = || format!("element {i}, outside the gradient");
            worst.add(name, elements.get(i).into(), PADDING.into(), 0.0);
        }
        Ok(worst)
    }
}
