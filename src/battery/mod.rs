//! The test battery that every backend must pass: each shape, dtype and edge case against the float64
//! [`reference`](mod@reference), and the reference against finite differences and identities.
//!
//! What a backend may be off by:
//!
//! | what | allowed error |
//! |---|---|
//! | loss | 1e-6 relative (2e-6, a token's own, if a finite logit is beyond 50 in size) + 2e-7 absolute, times T^2 where the distillation terms are and that is above 1 |
//! | TKD, DKD, UNC, margin, loss of a token | 2e-6 (1 + \|value\|), of the loss 2e-6 T^2 likewise |
//! | float32 gradient | 1e-6 of the row's largest + 5e-7 (kd_weight [T^2] + ce_weight) scale / T |
//! | float16 and bfloat16 gradient | that, plus half a unit in the last place of the exact gradient |
//! | which tokens are valid and hard; what is NaN or infinite | none, but what is beyond float32 may be infinite |

use half::{bf16, f16};

use crate::{
    Batch, Coefficient, Coefficients, Dtype, Elements, ElementsMut, Logits, LogitsMut, Objective,
    Output, Reduction, Result, Strides, Target, reference,
};

type Backend<'a> = dyn Fn(&Objective, &Batch, Logits, LogitsMut) -> Result<Output> + 'a;

/// [`reference::forward_backward`] with the gradient rounded to the dtype that is asked for.
pub fn reference_backend(
    objective: &Objective,
    batch: &Batch,
    student: Logits,
    mut gradient: LogitsMut,
) -> Result<Output> {
    let (output, exact) = reference::forward_backward(objective, batch, student)?;
    for (mut row, exact) in gradient.rows().into_iter().zip(exact.chunks(student.vocab())) {
        for (j, &value) in exact.iter().enumerate() {
            match &mut row {
                ElementsMut::F32(row) => row[j] = value as f32,
                ElementsMut::F16(row) => row[j] = f16::from_f64(value),
                ElementsMut::Bf16(row) => row[j] = bf16::from_f64(value),
            }
        }
    }
    Ok(output)
}

/// The outcome of one case.
#[derive(Clone, Debug)]
pub struct Check {
    /// What kind of case it is.
    pub group: &'static str,
    /// The case's name within the group.
    pub case: String,
    /// The largest error, over what is allowed. The case failed if it is above 1.
    pub worst: f64,
    /// What had it, in words and numbers.
    pub detail: String,
}

impl Check {
    /// Whether every error was within what is allowed.
    pub fn passed(&self) -> bool {
        self.worst <= 1.0
    }
}

/// For tests.
///
/// # Panics
/// If a case failed, with the first 40 that did.
pub fn assert_all_pass(checks: &[Check]) {
    let failed: Vec<&Check> = checks.iter().filter(|check| !check.passed()).collect();
    let lines = failed.iter().take(40).map(|check| {
        let Check { group, case, worst, detail } = check;
        format!("{group} / {case}: {worst:.3} of the bound, {detail}")
    });
    let shown = lines.collect::<Vec<_>>().join("\n");
    assert!(failed.is_empty(), "{} of {} cases failed:\n{shown}", failed.len(), checks.len());
}

/// The largest error so far, over what is allowed.
struct Worst {
    ratio: f64,
    detail: String,
}

impl Worst {
    fn new() -> Self {
        Self { ratio: 0.0, detail: "exact".into() }
    }

    fn fail(detail: String) -> Self {
        Self { ratio: f64::INFINITY, detail }
    }

    fn add(&mut self, what: impl FnOnce() -> String, actual: f64, expected: f64, allowed: f64) {
        let ratio = if expected.is_nan() {
            if actual.is_nan() { 0.0 } else { f64::INFINITY }
        } else if actual == expected
            || (beyond_float32(expected) && actual == expected.signum() * f64::INFINITY)
        {
            0.0
        } else if actual.is_finite() && expected.is_finite() {
            (actual - expected).abs() / allowed
        } else {
            f64::INFINITY
        };
        if ratio > self.ratio {
            let detail = format!("{}: {actual:e}, exactly {expected:e}", what());
            *self = Self { ratio, detail };
        }
    }
}

fn beyond_float32(value: f64) -> bool {
    value.abs() > f64::from(f32::MAX)
}

/// Logits of one of the three dtypes.
enum Tensor {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Tensor {
    fn new(dtype: Dtype, values: impl Iterator<Item = f32>) -> Self {
        match dtype {
            Dtype::F32 => Self::F32(values.collect()),
            Dtype::F16 => Self::F16(values.map(f16::from_f32).collect()),
            Dtype::Bf16 => Self::Bf16(values.map(bf16::from_f32).collect()),
        }
    }

    fn elements(&self) -> Elements<'_> {
        match self {
            Self::F32(v) => v.into(),
            Self::F16(v) => v.into(),
            Self::Bf16(v) => v.into(),
        }
    }

    fn elements_mut(&mut self) -> ElementsMut<'_> {
        match self {
            Self::F32(v) => v.into(),
            Self::F16(v) => v.into(),
            Self::Bf16(v) => v.into(),
        }
    }
}

/// One call of a backend.
#[derive(Clone)]
struct Case {
    name: String,
    objective: Objective,
    vocab: usize,
    teacher: Vec<f32>,
    student: Vec<f32>,
    /// Empty for none at all.
    labels: Vec<i64>,
    sequences: Option<Vec<usize>>,
    margins: Option<Vec<f32>>,
    hard: Option<Vec<bool>>,
    teacher_dtype: Dtype,
    student_dtype: Dtype,
    gradient_dtype: Dtype,
    /// Elements between the rows, and before the first.
    padding: usize,
    /// Whether every `INNER` rows are followed by a gap that is longer than a row: of teacher, student and gradient.
    nested: [bool; 3],
}

/// Rows of one outer index, where there are any.
const INNER: usize = 3;
const TEACHER: usize = 0;
const STUDENT: usize = 1;
const GRADIENT: usize = 2;

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// What lies between the rows, and must stay there.
const PADDING: f32 = 13.0;

fn random(tokens: usize, vocab: usize, seed: u64) -> Case {
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
        teacher_dtype: Dtype::F32,
        student_dtype: Dtype::F32,
        gradient_dtype: Dtype::F32,
        padding: 0,
        nested: [false; 3],
    }
}

impl Case {
    fn tokens(&self) -> usize {
        self.teacher.len() / self.vocab
    }

    fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    fn with(mut self, objective: Result<Objective>) -> Self {
        self.objective = objective.expect("the battery's objectives are valid");
        self
    }

    fn dtypes(mut self, teacher: Dtype, student: Dtype, gradient: Dtype) -> Self {
        (self.teacher_dtype, self.student_dtype, self.gradient_dtype) =
            (teacher, student, gradient);
        self
    }

    /// Where the rows of a matrix start; no gap is a multiple of 16 bytes with its rows.
    fn strides(&self, matrix: usize) -> Strides {
        let row = self.vocab + self.padding;
        match self.nested[matrix] {
            true => Strides::nested(INNER, (INNER + 1) * row + 1, row),
            false => row.into(),
        }
    }

    /// `values` with the padding in place.
    fn tensor(&self, matrix: usize, dtype: Dtype, values: &[f32]) -> Tensor {
        let strides = self.strides(matrix);
        let mut elements =
            vec![PADDING; self.padding + strides.start(self.tokens()) + self.padding];
        for (i, row) in values.chunks(self.vocab).enumerate() {
            elements[self.padding + strides.start(i)..][..self.vocab].copy_from_slice(row);
        }
        Tensor::new(dtype, elements.into_iter())
    }

    fn view<'a>(&self, matrix: usize, tensor: &'a Tensor) -> Result<Logits<'a>> {
        let elements = tensor.elements();
        let elements = elements.slice(self.padding..elements.len());
        Logits::strided(elements, self.tokens(), self.vocab, self.strides(matrix))
    }

    fn run(&self, backend: &Backend) -> Worst {
        self.compare(backend).unwrap_or_else(|error| Worst::fail(format!("error: {error}")))
    }

    fn compare(&self, backend: &Backend) -> Result<Worst> {
        let (tokens, vocab, objective) = (self.tokens(), self.vocab, &self.objective);
        let teacher = self.tensor(TEACHER, self.teacher_dtype, &self.teacher);
        let student = self.tensor(STUDENT, self.student_dtype, &self.student);
        let mut gradient = self.tensor(GRADIENT, self.gradient_dtype, &vec![99.0; tokens * vocab]);
        let batch = match self.labels.is_empty() {
            true => Batch::unlabelled(self.view(TEACHER, &teacher)?),
            false => Batch::new(self.view(TEACHER, &teacher)?, &self.labels)?,
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
        let student = self.view(STUDENT, &student)?;
        let mut elements = gradient.elements_mut();
        let end = elements.as_ref().len();
        let strides = self.strides(GRADIENT);
        let view = LogitsMut::strided(elements.slice(self.padding..end), tokens, vocab, strides)?;
        let output = backend(objective, &batch, student, view)?;
        let (exact, exact_gradient) = reference::forward_backward(objective, &batch, student)?;

        let mut worst = Worst::new();
        let valid = exact.tokens.iter().filter(|token| token.valid).count();
        let scale = objective.reduction_scale(valid);
        let squared =
            if objective.temperature_squared() { objective.temperature().powi(2) } else { 1.0 };
        let unit = squared.max(1.0);
        let logits = self.teacher.iter().chain(&self.student).filter(|z| z.is_finite());
        let largest = logits.fold(0.0_f32, |largest, z| largest.max(z.abs()));
        // The loss may be that of one token, which a logit far below the others makes.
        let relative = if largest <= 50.0 { 1e-6 } else { 2e-6 };
        let allowed = relative * exact.loss.abs() + 2e-7 * unit;
        worst.add(|| "loss".into(), output.loss, exact.loss, allowed);
        for (i, (token, exact)) in output.tokens.iter().zip(&exact.tokens).enumerate() {
            if (token.valid, token.hard) != (exact.valid, exact.hard) {
                return Ok(Worst::fail(format!(
                    "token {i}: valid {}, hard {}; exactly {}, {}",
                    token.valid, token.hard, exact.valid, exact.hard
                )));
            }
            for (what, term, exact, unit) in [
                ("margin", token.margin, exact.margin, 1.0),
                ("UNC", token.uncertainty, exact.uncertainty, 1.0),
                ("TKD", token.tkd, exact.tkd, 1.0),
                ("DKD", token.dkd, exact.dkd, 1.0),
                ("loss", token.loss, exact.loss, unit),
            ] {
                let allowed = 2e-6 * (unit + exact.abs());
                worst.add(|| format!("{what} of token {i}"), term, exact, allowed);
            }
        }

        let scale = scale * objective.upstream_gradient().abs();
        let floor = 5e-7 * (objective.distillation_scale() + objective.ce_weight()) * scale
            / objective.temperature();
        let elements = gradient.elements();
        let mut outside = vec![true; elements.len()];
        for (i, exact) in exact_gradient.chunks(vocab).enumerate() {
            let largest = exact.iter().fold(0.0_f64, |largest, g| largest.max(g.abs()));
            let start = self.padding + strides.start(i);
            outside[start..start + vocab].fill(false);
            let mut sum = 0.0;
            for (j, &exact) in exact.iter().enumerate() {
                let actual = f64::from(elements.get(start + j));
                let allowed = 1e-6 * largest + floor + half_ulp(self.gradient_dtype, exact);
                worst.add(|| format!("gradient[{i}, {j}]"), actual, exact, allowed);
                sum += actual;
            }
            // Where the loss is infinite the limit of the gradient need not sum to 0.
            if self.gradient_dtype == Dtype::F32 && output.tokens[i].loss.is_finite() {
                // Rounding of each element, and what the floor allows the row as a whole.
                let total: f64 = exact.iter().map(|g| g.abs()).sum();
                worst.add(|| format!("sum of gradient[{i}]"), sum, 0.0, 1e-6 * total + floor);
            }
        }
        for (i, _) in outside.iter().enumerate().filter(|(_, outside)| **outside) {
            let name = || format!("element {i}, outside the gradient");
            worst.add(name, elements.get(i).into(), PADDING.into(), 0.0);
        }
        Ok(worst)
    }
}

/// Half the distance from `value` to its neighbours in `dtype`; 0 for float32, whose rounding the
/// other terms allow for.
fn half_ulp(dtype: Dtype, value: f64) -> f64 {
    let (digits, lowest) = match dtype {
        Dtype::F32 => return 0.0,
        Dtype::F16 => (10, -14),
        Dtype::Bf16 => (7, -126),
    };
    let exponent =
        if value == 0.0 { lowest } else { (value.abs().log2().floor() as i32).max(lowest) };
    0.5 * 2.0_f64.powi(exponent - digits)
}

fn decoupled(easy: (f64, f64), hard: (f64, f64)) -> Result<Objective> {
    Objective::decoupled(Coefficients::new(easy.0, easy.1), Coefficients::new(hard.0, hard.1))
}

/// A spread over everything an objective can say.
fn objectives() -> Vec<(&'static str, Result<Objective>)> {
    let atkd = Objective::default();
    let mixed = || Objective::default().with_ce_weight(0.7).and_then(|o| o.with_kd_weight(0.3));
    vec![
        ("atkd", Ok(atkd)),
        ("atkd, lambda 0", Objective::atkd(0.0)),
        ("atkd, lambda 1", Objective::atkd(1.0)),
        ("kl", Ok(Objective::kl())),
        ("tkd", Ok(Objective::tkd())),
        ("dkd", Ok(Objective::dkd())),
        ("decoupled", decoupled((0.9, 0.1), (0.25, 0.75))),
        (
            "UNC on hard DKD alone",
            Objective::decoupled(
                Coefficients::new(0.5, 0.5),
                Coefficients::new(1.0, Coefficient::Uncertainty),
            ),
        ),
        ("cross entropy mixed in", mixed()),
        (
            "cross entropy alone",
            Objective::tkd().with_kd_weight(0.0).and_then(|o| o.with_ce_weight(1.0)),
        ),
        ("temperature 2", atkd.with_temperature(2.0)),
        ("temperature 0.5", Objective::kl().with_temperature(0.5)),
        (
            "temperature 4, squared",
            atkd.with_temperature(4.0).map(|o| o.with_temperature_squared(true)),
        ),
        ("temperature 3, cross entropy", mixed().and_then(|o| o.with_temperature(3.0))),
        ("hard ratio 0", atkd.with_hard_ratio(0.0)),
        ("hard ratio 0.25", atkd.with_hard_ratio(0.25)),
        ("hard ratio 1", atkd.with_hard_ratio(1.0)),
        ("sum", atkd.with_reduction(Reduction::Sum)),
        ("denominator 1000", atkd.with_reduction(Reduction::Denominator(1000.0))),
        ("upstream gradient -2.5", atkd.with_upstream_gradient(-2.5)),
        ("upstream gradient 0", atkd.with_upstream_gradient(0.0)),
        ("teacher's arg max", Ok(atkd.with_target(Target::Teacher))),
    ]
}

fn shapes() -> Vec<Case> {
    let mut cases = Vec::new();
    for vocab in [1, 2, 3, 31, 32, 33, 1000, 4096, 50257] {
        for teacher in DTYPES {
            for student in DTYPES {
                let tokens = if vocab < 5000 { 6 } else { 2 };
                let case = random(tokens, vocab, vocab as u64);
                let name = format!("[{tokens}, {vocab}] {teacher} teacher, {student} student");
                cases.push(case.clone().named(&name).dtypes(teacher, student, student));
                if student != Dtype::F32 {
                    let name = format!("{name}, F32 gradient");
                    cases.push(case.named(name).dtypes(teacher, student, Dtype::F32));
                }
            }
        }
    }
    for padding in [1, 3, 8, 61] {
        for dtype in DTYPES {
            for vocab in [5, 130, 4099] {
                let mut case = random(5, vocab, 77).dtypes(dtype, dtype, dtype);
                case.padding = padding;
                cases.push(
                    case.named(format!("[5, {vocab}] {dtype}, row stride {}", vocab + padding)),
                );
            }
        }
    }
    for (dtype, vocab, padding, nested) in [
        (Dtype::F32, 130, 0, [true; 3]),
        (Dtype::F16, 4096, 8, [true; 3]),
        (Dtype::Bf16, 4099, 0, [true; 3]),
        (Dtype::Bf16, 4096, 0, [true, false, false]),
        (Dtype::F32, 1024, 0, [false, true, false]),
        (Dtype::F16, 4096, 0, [false, false, true]),
        (Dtype::Bf16, 130, 1, [false, true, true]),
    ] {
        let mut case = random(9, vocab, 78).dtypes(dtype, dtype, dtype);
        (case.padding, case.nested) = (padding, nested);
        let strides = [TEACHER, STUDENT, GRADIENT].map(|matrix| case.strides(matrix).to_string());
        cases.push(case.named(format!("[9, {vocab}] {dtype}, {}", strides.join("; "))));
    }
    cases
}

fn objective_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, objective) in objectives() {
        let mut case = random(12, 97, 5).with(objective.clone());
        case.labels[3] = -100;
        case.labels[11] = -100;
        cases.push(case.clone().named(name));
        cases.push(case.named(format!("{name}, BF16")).dtypes(
            Dtype::Bf16,
            Dtype::Bf16,
            Dtype::Bf16,
        ));
        // More than one block of a row, and a sharper teacher.
        let mut case = random(4, 7001, 6).with(objective).named(format!("{name}, sharp"));
        case.teacher.iter_mut().for_each(|z| *z *= 3.0);
        cases.push(case);
    }
    cases.extend(hot());
    cases
}

/// Cross entropy at temperature 1 beside distillation at a high one: what is a small step for the one is
/// beyond float32's exponentials for the other.
fn hot() -> Vec<Case> {
    [50.0, 40.0]
        .into_iter()
        .map(|temperature| {
            let objective = Objective::kl()
                .with_ce_weight(1.0)
                .and_then(|objective| objective.with_temperature(temperature));
            let mut case = random(2, 9000, 8).with(objective);
            case.student.iter_mut().for_each(|z| *z -= 45.0);
            for late in [4000, 8999] {
                case.student[late] = 50.0;
            }
            case.named(format!("temperature {temperature}, cross entropy, a peak late in the row"))
        })
        .collect()
}

fn selections() -> Vec<Case> {
    let atkd = Objective::default();
    let mut cases = Vec::new();
    for tokens in [1, 2, 3, 10, 101, 1000] {
        for ratio in [0.0, 0.1, 0.5, 0.7, 1.0] {
            let mut case = random(tokens, 11, tokens as u64).with(atkd.with_hard_ratio(ratio));
            for i in (2..tokens).step_by(5) {
                case.labels[i] = -100;
            }
            cases.push(case.named(format!("{tokens} tokens, hard ratio {ratio}")));
        }
    }
    // Rows that start equally far from a multiple of 16 bytes: others are summed in another order, and equal
    // ones may then differ in the last bit.
    let mut ties = random(12, 24, 1);
    let (first, label) = (ties.teacher[..24].to_vec(), ties.labels[0]);
    for i in [1, 2, 5, 6, 7, 8, 9, 11] {
        ties.teacher[i * 24..][..24].copy_from_slice(&first);
        ties.labels[i] = label;
    }
    cases.push(ties.clone().named("equal margins: the lower index"));
    ties.labels[5] = -100;
    cases.push(ties.clone().named("equal margins, one ignored"));
    ties.labels.clear();
    cases.push(
        ties.with(Ok(atkd.with_target(Target::Teacher))).named("no labels, teacher's arg max"),
    );
    let mut arg_max = random(6, 40, 8).with(Ok(atkd.with_target(Target::Teacher)));
    for row in arg_max.teacher.chunks_mut(40) {
        (row[7], row[21], row[39]) = (9.0, 9.0, 9.0);
    }
    cases.push(arg_max.named("teacher's arg max: the lowest index among equals"));
    let mut sequences = random(20, 13, 2);
    sequences.labels[6..9].fill(-100);
    sequences.sequences = Some(vec![0, 1, 6, 9, 9, 20]);
    cases.push(sequences.named("per sequence, one empty, one all ignored"));
    let mut ignored = random(5, 13, 3);
    ignored.labels.fill(-100);
    cases.push(ignored.clone().named("all ignored"));
    cases.push(
        ignored
            .with(atkd.with_reduction(Reduction::Denominator(8.0)))
            .named("all ignored, denominator"),
    );
    cases.push(random(0, 13, 4).with(Ok(atkd.with_target(Target::Teacher))).named("no tokens"));
    let mut negative = random(6, 13, 3).with(Ok(atkd.with_ignore_index(2)));
    negative.labels[4] = 2;
    cases.push(negative.named("ignore_index 2"));
    // 1 - p is 1 in float32 for all of these, and yet they differ.
    let mut hopeless = random(8, 50, 9);
    for (i, row) in hopeless.teacher.chunks_mut(50).enumerate() {
        row[hopeless.labels[i] as usize] = -30.0 - (i * 5 % 8) as f32;
    }
    cases.push(hopeless.named("hopeless teachers are told apart"));
    // Margins are compared in single precision, where those of the labels 1e-9 and 0 are one number.
    let mut alike = random(4, 13, 9);
    for (i, row) in alike.teacher.chunks_mut(13).enumerate() {
        row.fill(0.0);
        row[alike.labels[i] as usize] = if i % 2 == 0 { 1e-9 } else { 0.0 };
    }
    cases.push(alike.named("margins that differ in float64 alone: the lower index"));

    let mut given = random(40, 11, 10);
    for i in (2..40).step_by(5) {
        given.labels[i] = -100;
    }
    let in_sequences = Some(vec![0, 3, 3, 30, 40]);
    let unlabelled = |case: &Case| {
        Case { labels: Vec::new(), ..case.clone() }.with(Ok(atkd.with_target(Target::Teacher)))
    };
    // The selection is no longer the teacher's, and ignored tokens are among those chosen.
    let mask = Case { hard: Some((0..40).map(|i| i % 3 == 0).collect()), ..given.clone() };
    cases.push(mask.clone().named("a mask"));
    cases.push(unlabelled(&mask).named("a mask, no labels, teacher's arg max"));
    for (name, objective) in [
        ("a mask, hard ratio 0", atkd.with_hard_ratio(0.0)),
        ("a mask, hard ratio 1", atkd.with_hard_ratio(1.0)),
        ("a mask, which changes no loss", Ok(Objective::kl())),
    ] {
        cases.push(mask.clone().with(objective).named(name));
    }
    let all = Case { hard: Some(vec![true; 40]), ..mask.clone() };
    cases.push(all.named("a mask of all tokens"));
    cases.push(Case { hard: Some(vec![false; 40]), ..mask.clone() }.named("a mask of no token"));
    let mut one = random(1, 11, 11);
    one.hard = Some(vec![false]);
    cases.push(one.named("a mask of no token, for one"));
    let none = Case { hard: Some(Vec::new()), ..random(0, 11, 12) };
    cases.push(none.with(Ok(atkd.with_target(Target::Teacher))).named("a mask, no tokens"));
    let numbers = [3.0, f32::NAN, -2.0, 0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 3.0];
    let margins = (0..40).map(|i| numbers[i * 5 % 8]).collect();
    let margins = Case { margins: Some(margins), ..given };
    cases.push(margins.clone().named("margins given, some equal, some NaN"));
    cases.push(unlabelled(&margins).named("margins given, no labels, teacher's arg max"));
    for ratio in [0.0, 0.01, 0.9, 1.0] {
        let case = margins.clone().with(atkd.with_hard_ratio(ratio));
        cases.push(case.named(format!("margins given, hard ratio {ratio}")));
    }
    cases.push(margins.clone().with(Ok(Objective::dkd())).named("margins given, to no effect"));
    let margins = Case { sequences: in_sequences, ..margins };
    cases.push(margins.clone().named("margins given, per sequence"));
    cases.push(Case { hard: mask.hard, ..margins }.named("a mask beside margins and sequences"));
    cases
}

/// Names, and what each does to the rows of teacher and student (target 3).
type Edit = fn(&mut [f32], &mut [f32]);

const MASK: f32 = f32::NEG_INFINITY;

const EDGES: &[(&str, Edit)] = &[
    ("confident teacher", |a, _| a[3] = 43.0),
    ("hopeless teacher", |a, _| a[3] = -37.0),
    ("confident student", |_, b| b[3] = 43.0),
    ("hopeless student", |_, b| b[3] = -37.0),
    ("both confident", |a, b| (a[3], b[3]) = (43.0, 42.0)),
    ("both hopeless", |a, b| (a[3], b[3]) = (-37.0, -36.0)),
    ("confident teacher, hopeless student", |a, b| (a[3], b[3]) = (43.0, -37.0)),
    ("hopeless teacher, confident student", |a, b| (a[3], b[3]) = (-37.0, 43.0)),
    // Odds that float32 holds, but not their reciprocal.
    ("hopeless teacher at the end of float32", |a, _| hopeless_to_the_end(a)),
    ("hopeless student at the end of float32", |_, b| hopeless_to_the_end(b)),
    ("both hopeless at the end of float32", |a, b| {
        hopeless_to_the_end(a);
        hopeless_to_the_end(b);
    }),
    ("teacher certain beyond float64", |a, _| a[3] = 2000.0),
    ("teacher against it beyond float64", |a, _| a[3] = -2000.0),
    ("logits up to 50", |a, b| {
        a.iter_mut().for_each(|z| *z *= 50.0 / 8.0);
        b.iter_mut().for_each(|z| *z *= -50.0 / 8.0);
    }),
    ("logits up to 1e4", |a, b| {
        a.iter_mut().for_each(|z| *z *= 1250.0);
        b.iter_mut().for_each(|z| *z *= 1250.0);
    }),
    ("logits about 1e4", |a, b| {
        a.iter_mut().for_each(|z| *z += 1e4);
        b.iter_mut().for_each(|z| *z -= 1e4);
    }),
    ("one logit above all others", |a, b| {
        a.fill(0.0);
        b.fill(0.0);
        (a[30], b[31]) = (60.0, 60.0);
    }),
    ("equal logits", |a, b| {
        a.fill(1.5);
        b.fill(-2.5);
    }),
    ("student equals teacher", |a, b| b.copy_from_slice(a)),
    ("rising logits", |a, b| {
        for j in 0..a.len() {
            (a[j], b[j]) = (j as f32 / 64.0, -(j as f32) / 64.0);
        }
    }),
    ("padded vocabulary", |a, b| {
        a[33..].fill(MASK);
        b[33..].fill(MASK);
    }),
    ("padded at the front", |a, b| {
        a[..3].fill(MASK);
        b[..3].fill(MASK);
        a[4..9].fill(MASK);
        b[4..9].fill(MASK);
    }),
    ("padding of -3.4e38", |a, b| {
        a[33..].fill(f32::MIN);
        b[33..].fill(f32::MIN);
    }),
    ("padding of -65504", |a, b| {
        a[33..].fill(-65504.0);
        b[33..].fill(-65504.0);
    }),
    ("teacher masks more", |a, b| {
        a[20..].fill(MASK);
        b[33..].fill(MASK);
    }),
    ("student rules out what the teacher allows", |_, b| b[20] = MASK),
    ("student rules out all but the target", |_, b| {
        let target = b[3];
        b.fill(MASK);
        b[3] = target;
    }),
    ("target masked by the teacher", |a, _| a[3] = MASK),
    ("target masked by the student", |_, b| b[3] = MASK),
    ("target masked by both", |a, b| (a[3], b[3]) = (MASK, MASK)),
    ("teacher has no mass off the target", |a, _| {
        let target = a[3];
        a.fill(MASK);
        a[3] = target;
    }),
    ("neither has mass off the target", |a, b| {
        let targets = (a[3], b[3]);
        a.fill(MASK);
        b.fill(MASK);
        (a[3], b[3]) = targets;
    }),
    ("one token beside the target", |a, b| {
        let (target, other) = (a[3], a[17]);
        a.fill(MASK);
        (a[3], a[17]) = (target, other);
        b[33..].fill(MASK);
    }),
    ("teacher all -inf", |a, _| a.fill(MASK)),
    ("student all -inf", |_, b| b.fill(MASK)),
    ("NaN in the teacher", |a, _| a[12] = f32::NAN),
    ("NaN in the student", |_, b| b[12] = f32::NAN),
    ("NaN in the teacher's target", |a, _| a[3] = f32::NAN),
    ("NaN in the student's target", |_, b| b[3] = f32::NAN),
    ("+inf in the teacher", |a, _| a[12] = f32::INFINITY),
    ("+inf in the student", |_, b| b[12] = f32::INFINITY),
    ("+inf in the teacher's target", |a, _| a[3] = f32::INFINITY),
    ("+inf in the student's target", |_, b| b[3] = f32::INFINITY),
    ("far larger logits at the end", |a, b| {
        far_larger_at_the_end(a);
        far_larger_at_the_end(b);
    }),
    ("far larger logits at the end of the teacher's row", |a, _| far_larger_at_the_end(a)),
    ("far larger logits at the end of the student's row", |_, b| far_larger_at_the_end(b)),
    ("NaN in the teacher before far larger logits", |a, b| {
        a[12] = f32::NAN;
        far_larger_at_the_end(a);
        far_larger_at_the_end(b);
    }),
    ("NaN in the student before far larger logits", |a, b| {
        b[12] = f32::NAN;
        far_larger_at_the_end(a);
        far_larger_at_the_end(b);
    }),
    ("student rules out a token before far larger logits", |a, b| {
        b[20] = MASK;
        far_larger_at_the_end(a);
        far_larger_at_the_end(b);
    }),
    ("padding before far larger logits", |a, b| {
        let end = a.len() / 4 * 3;
        a[13..end].fill(MASK);
        b[13..end].fill(MASK);
        far_larger_at_the_end(a);
        far_larger_at_the_end(b);
    }),
    ("NaN among -inf", |a, _| {
        a.fill(MASK);
        a[12] = f32::NAN;
    }),
];

/// Beside which what comes before is nothing in float32; so many that every thread of a kernel meets one.
fn far_larger_at_the_end(z: &mut [f32]) {
    let start = z.len() / 4 * 3;
    z[start..].iter_mut().for_each(|z| *z += 150.0);
}

/// A margin of 87.9.
fn hopeless_to_the_end(z: &mut [f32]) {
    z.fill(-20.0);
    (z[3], z[12], z[13]) = (-87.2, 0.0, 0.0);
}

fn edges() -> Vec<Case> {
    let mut cases = Vec::new();
    let ce = |objective: Objective| objective.with_ce_weight(0.5);
    let objectives = [
        ("atkd", Ok(Objective::default())),
        ("kl", Ok(Objective::kl())),
        ("tkd and cross entropy", ce(Objective::tkd())),
        ("dkd and cross entropy", ce(Objective::dkd())),
        (
            "atkd at 2, cross entropy",
            ce(Objective::default()).and_then(|o| o.with_temperature(2.0)),
        ),
    ];
    for (edge, edit) in EDGES {
        for (name, objective) in &objectives {
            for vocab in [40, 4500] {
                // The odd row in the middle of others, which must stay right.
                let mut case = random(3, vocab, 21).with(objective.clone());
                case.labels.fill(3);
                edit(&mut case.teacher[vocab..][..vocab], &mut case.student[vocab..][..vocab]);
                cases.push(case.clone().named(format!("{edge}, V = {vocab}, {name}")));
                if vocab == 40 {
                    for dtype in [Dtype::F16, Dtype::Bf16] {
                        // A mask of float16's least finite value; infinities and NaN as they are.
                        let mut case = case.clone();
                        for z in case.teacher.iter_mut().chain(&mut case.student) {
                            *z = if z.is_finite() { z.clamp(-65504.0, 65504.0) } else { *z };
                        }
                        let case = case.named(format!("{edge}, {dtype}, {name}"));
                        cases.push(case.dtypes(dtype, dtype, dtype));
                    }
                }
            }
        }
    }
    for (name, objective) in objectives {
        for u in [-40.0, 0.0, 40.0] {
            for w in [-40.0, 0.0, 40.0] {
                let mut case = random(1, 2, 1).with(objective.clone());
                (case.teacher, case.student, case.labels) = (vec![u, 0.0], vec![w, 0.0], vec![1]);
                cases.push(case.named(format!("V = 2, u = {u}, w = {w}, {name}")));
            }
        }
    }
    cases
}

/// What stands for -inf where that is not to be had: float16's lowest and the customary ones.
const FINITE_MASKS: [f32; 5] = [-1e4, -65504.0, -1e9, -1e30, f32::MIN];

/// Objectives for rows of unusual size: every term, at temperatures that make more and less of them.
fn at_temperatures() -> [(&'static str, Result<Objective>); 3] {
    let ce = |objective: Objective| objective.with_ce_weight(0.5);
    [
        ("kl and cross entropy", ce(Objective::kl())),
        (
            "atkd at 2, cross entropy",
            ce(Objective::default()).and_then(|o| o.with_temperature(2.0)),
        ),
        ("kl at 0.05", Objective::kl().with_temperature(0.05)),
    ]
}

/// The odd row in the middle of others, which must stay right, target 3.
fn odd_row(objective: &Result<Objective>, vocab: usize, edit: impl Fn([&mut [f32]; 2])) -> Case {
    let mut case = random(3, vocab, 23).with(objective.clone());
    case.labels.fill(3);
    edit([&mut case.teacher[vocab..][..vocab], &mut case.student[vocab..][..vocab]]);
    case
}

const MODELS: [(&str, [bool; 2]); 3] =
    [("teacher", [true, false]), ("student", [false, true]), ("both", [true, true])];

fn finite_masks() -> Vec<Case> {
    let mut cases = Vec::new();
    for mask in FINITE_MASKS {
        for (models, masked) in MODELS {
            for (what, first) in [("the end", 33), ("all but the target", 0)] {
                let edit = |rows: [&mut [f32]; 2]| {
                    for (row, _) in rows.into_iter().zip(masked).filter(|(_, masked)| *masked) {
                        let target = row[3];
                        row[first..].fill(mask);
                        row[3] = target;
                    }
                };
                for (name, objective) in at_temperatures() {
                    let case = odd_row(&objective, 40, edit);
                    let name = format!("{mask:e} at {what}, {models}, {name}");
                    let dtype = if mask >= -65504.0 { Dtype::F16 } else { Dtype::Bf16 };
                    let narrow = case.clone().dtypes(dtype, dtype, dtype);
                    // float32's lowest is -inf in bfloat16.
                    if mask > f32::MIN {
                        cases.push(narrow.named(format!("{name}, {dtype}")));
                    }
                    cases.push(case.named(name));
                }
                let case = odd_row(&Ok(Objective::kl()), 4500, edit);
                cases.push(case.named(format!("{mask:e} at {what}, {models}, V = 4500, kl")));
            }
        }
    }
    cases
}

fn magnitudes() -> Vec<Case> {
    let mut cases = Vec::new();
    // log2(e) / T times these lies below and beyond 2^24 and 2^31.
    for size in [1e6, 1.2e7, 3e8, 3.06e9, 5e9, 1e11, 1e20, 1e30, 3e38] {
        for (models, large) in MODELS {
            let large = move |rows: [&mut [f32]; 2], edit: fn(&mut f32, f32)| {
                for (row, _) in rows.into_iter().zip(large).filter(|(_, large)| *large) {
                    row.iter_mut().for_each(|z| edit(z, size));
                }
            };
            for (name, objective) in at_temperatures() {
                let name = format!("{size:e}, {models}, {name}");
                let case = odd_row(&objective, 40, |rows| large(rows, |z, size| *z *= size / 8.0));
                cases.push(case.clone().named(format!("logits up to {name}")));
                if size > 1e9 {
                    let case = case.dtypes(Dtype::Bf16, Dtype::Bf16, Dtype::Bf16);
                    cases.push(case.named(format!("logits up to {name}, BF16")));
                }
                let case = odd_row(&objective, 40, |rows| large(rows, |z, size| *z += size));
                cases.push(case.named(format!("logits about {name}")));
                let case = odd_row(&objective, 40, |rows| large(rows, |z, size| *z -= size));
                cases.push(case.named(format!("logits about -{name}")));
                for at in [3, 17] {
                    let case = odd_row(&objective, 40, |rows| {
                        large(rows.map(|row| &mut row[at..][..1]), |z, size| *z = size)
                    });
                    cases.push(case.named(format!("one logit, {at}, of {name}")));
                }
            }
            let objective = Ok(Objective::kl());
            let case = odd_row(&objective, 4500, |rows| large(rows, |z, size| *z *= size / 8.0));
            cases.push(case.named(format!("logits up to {size:e}, {models}, V = 4500, kl")));
        }
    }
    cases
}

/// From 0.05 to 10, with the square of it as a weight.
fn temperatures() -> Vec<Case> {
    let mut cases = Vec::new();
    let mixed = Objective::default().with_ce_weight(0.3);
    for temperature in [0.05, 0.1, 0.3, 3.0, 5.0, 8.0, 10.0] {
        for (name, objective) in
            [("kl", Ok(Objective::kl())), ("atkd, cross entropy", mixed.clone())]
        {
            for squared in [false, true] {
                for vocab in [40, 1000, 5003] {
                    let objective = objective.clone().and_then(|o| o.with_temperature(temperature));
                    let case = random(if vocab == 5003 { 2 } else { 8 }, vocab, 41)
                        .with(objective.map(|o| o.with_temperature_squared(squared)));
                    let weight = if squared { ", squared" } else { "" };
                    cases.push(case.named(format!("{temperature}{weight}, V = {vocab}, {name}")));
                }
            }
        }
    }
    cases
}

/// Students that have all but learnt.
fn close_models() -> Vec<Case> {
    let mut cases = Vec::new();
    for difference in [1e-1, 1e-2, 1e-3, 1e-4] {
        for temperature in [0.05, 1.0, 4.0, 10.0] {
            for vocab in [40, 1000, 5003] {
                let tokens = if vocab == 5003 { 2 } else { 12 };
                for (name, objective) in [("kl", Objective::kl()), ("atkd", Objective::default())] {
                    let objective =
                        objective.with_temperature_squared(true).with_temperature(temperature);
                    let mut case = random(tokens, vocab, 42).with(objective);
                    for (b, a) in case.student.iter_mut().zip(&case.teacher) {
                        *b = a + difference * *b;
                    }
                    cases.push(case.named(format!(
                        "{difference:e} apart, temperature {temperature} squared, V = {vocab}, {name}"
                    )));
                }
            }
        }
    }
    cases
}

/// Teachers that are sure of a token which is not the target, and students that agree: probabilities near 1
/// whose difference is the gradient.
fn sure_teachers() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, objective) in [
        ("kl", Ok(Objective::kl())),
        ("dkd", Ok(Objective::dkd())),
        ("kl at 0.5", Objective::kl().with_temperature(0.5)),
        ("kl at 4, squared", Objective::kl().with_temperature_squared(true).with_temperature(4.0)),
    ] {
        for vocab in [17, 257, 1000, 5003] {
            let tokens = if vocab == 5003 { 3 } else { 24 };
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let mut random = fastrand::Rng::with_seed(vocab as u64);
                let mut case = self::random(tokens, vocab, 43).with(objective.clone());
                case = case.dtypes(dtype, dtype, Dtype::F32);
                let rows = case.teacher.chunks_mut(vocab).zip(case.student.chunks_mut(vocab));
                for (i, (a, b)) in rows.enumerate() {
                    a.iter_mut().for_each(|z| *z = 4.0 * random.f32() - 2.0);
                    let sure = (case.labels[i] as usize + 1 + random.usize(0..vocab - 1)) % vocab;
                    a[sure] = 6.0 + 14.0 * random.f32();
                    for (b, a) in b.iter_mut().zip(&*a) {
                        *b = a + random.f32() - 0.5;
                    }
                }
                cases.push(case.named(format!("V = {vocab}, {dtype}, {name}")));
            }
        }
    }
    cases
}

/// KL divergence and cross entropy by their textbook formulas, of logits of ordinary size.
fn textbook(a: &[f64], b: &[f64], target: usize) -> [f64; 5] {
    let softmax = |logits: &[f64]| -> Vec<f64> {
        let sum: f64 = logits.iter().map(|z| z.exp()).sum();
        logits.iter().map(|z| z.exp() / sum).collect()
    };
    let (p, q) = (softmax(a), softmax(b));
    let kl = |p: &[f64], q: &[f64]| -> f64 { p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum() };
    let renormalised = |p: &[f64]| -> Vec<f64> {
        let others = p.iter().enumerate().filter(|&(j, _)| j != target);
        others.map(|(_, p_j)| p_j / (1.0 - p[target])).collect()
    };
    let tkd = kl(&[p[target], 1.0 - p[target]], &[q[target], 1.0 - q[target]]);
    let dkd = kl(&renormalised(&p), &renormalised(&q));
    [1.0 - p[target], tkd, dkd, kl(&p, &q), -q[target].ln()]
}

/// The reference's gradient against central differences of its loss.
fn differences(case: &Case) -> Result<Worst> {
    const STEP: f64 = 1e-4;
    let batch = Batch::new(Logits::new(&case.teacher, case.tokens(), case.vocab)?, &case.labels)?;
    let student = Logits::new(&case.student, case.tokens(), case.vocab)?;
    let (output, gradient) = reference::forward_backward(&case.objective, &batch, student)?;
    let upstream = case.objective.upstream_gradient();
    let mut worst = Worst::new();
    for (index, &analytic) in gradient.iter().enumerate() {
        let loss_at = |step: f64| -> Result<f64> {
            let row = |token: usize| {
                let row = &case.student[token * case.vocab..][..case.vocab];
                let mut row: Vec<f64> = row.iter().map(|&z| z.into()).collect();
                if token == index / case.vocab {
                    row[index % case.vocab] += step;
                }
                row
            };
            Ok(reference::compute(&case.objective, &batch, row, None)?.loss)
        };
        let slope = upstream * (loss_at(STEP)? - loss_at(-STEP)?) / (2.0 * STEP);
        // The step's square times a third derivative, and the loss's rounding over the step.
        let allowed = 2e-9 * (1.0 + output.loss.abs()) * (1.0 + upstream.abs());
        worst.add(|| format!("d loss / d student[{index}]"), analytic, slope, allowed);
    }
    Ok(worst)
}

/// The reference's terms against textbook formulas, KL = TKD + UNC DKD, and rows shifted by a constant.
fn identities(case: &Case) -> Result<Worst> {
    let vocab = case.vocab;
    let batch = Batch::new(Logits::new(&case.teacher, case.tokens(), vocab)?, &case.labels)?;
    let student = Logits::new(&case.student, case.tokens(), vocab)?;
    let (output, gradient) = reference::forward_backward(&case.objective, &batch, student)?;
    // Cross entropy is no term of its own: it is the loss where nothing else has a weight.
    let alone = Objective::tkd().with_kd_weight(0.0)?.with_ce_weight(1.0)?;
    let cross_entropy = reference::forward(&alone, &batch, student)?;
    let mut worst = Worst::new();
    let wide = |row: &[f32]| -> Vec<f64> { row.iter().map(|&z| z.into()).collect() };
    let rows = |token: usize| wide(&case.student[token * vocab..][..vocab]);
    for (i, token) in output.tokens.iter().enumerate() {
        let teacher = wide(&case.teacher[i * vocab..][..vocab]);
        let [uncertainty, tkd, dkd, kl, ce] = textbook(&teacher, &rows(i), case.labels[i] as usize);
        for (what, actual, expected) in [
            ("UNC", token.uncertainty, uncertainty),
            ("TKD", token.tkd, tkd),
            ("DKD", token.dkd, dkd),
            ("TKD + UNC DKD", token.tkd + token.uncertainty * token.dkd, kl),
            ("cross entropy", cross_entropy.tokens[i].loss, ce),
        ] {
            worst.add(
                || format!("{what} of token {i}"),
                actual,
                expected,
                1e-12 * (1.0 + expected),
            );
        }
        let sum: f64 = gradient[i * vocab..][..vocab].iter().sum();
        worst.add(|| format!("sum of gradient[{i}]"), sum, 0.0, 1e-14);
    }
    let shifted = |token: usize| rows(token).iter().map(|z| z + 17.25 * token as f64).collect();
    let shifted = reference::compute(&case.objective, &batch, shifted, None)?.loss;
    worst.add(|| "loss of shifted rows".into(), shifted, output.loss, 1e-12 * (1.0 + output.loss));
    Ok(worst)
}

/// Batch sizes whose valid tokens, one fewer, do not all divide evenly by the hard ratios.
const PAPER_TOKENS: [usize; 4] = [1, 4, 5, 12];

/// A loss as the paper and the documentation word it, with none of [`Objective`]'s own arithmetic.
struct Paper {
    name: &'static str,
    objective: Result<Objective>,
    temperature: f64,
    hard_ratio: f64,
    /// A token's loss from its textbook [UNC, TKD, DKD, KL, CE] and whether it is hard.
    token: fn([f64; 5], bool) -> f64,
    /// What the sum over so many valid tokens is divided by.
    divisor: fn(f64) -> f64,
}

fn paper() -> Vec<Paper> {
    let atkd = Objective::default();
    let kl = Objective::kl();
    let row = |name, objective, token| Paper {
        name,
        objective,
        temperature: 1.0,
        hard_ratio: 0.5,
        token,
        divisor: |valid| valid,
    };
    let atkd_token: fn([f64; 5], bool) -> f64 =
        |[_, tkd, dkd, ..], hard| if hard { 0.8 * (tkd + dkd) } else { 0.2 * dkd };
    let at_ratio = |name, hard_ratio| Paper {
        hard_ratio,
        ..row(name, atkd.with_hard_ratio(hard_ratio), atkd_token)
    };
    let reduced = |name, reduction, divisor| Paper {
        divisor,
        ..row(name, atkd.with_reduction(reduction), atkd_token)
    };
    vec![
        row("atkd", Ok(atkd), atkd_token),
        row("atkd, lambda 0.3", Objective::atkd(0.3), |[_, tkd, dkd, ..], hard| {
            if hard { 0.7 * (tkd + dkd) } else { 0.3 * dkd }
        }),
        row("kl", Ok(kl), |[.., kl, _], _| kl),
        row("tkd", Ok(Objective::tkd()), |[_, tkd, ..], _| tkd),
        row("dkd", Ok(Objective::dkd()), |[_, _, dkd, ..], _| dkd),
        row("decoupled", decoupled((0.9, 0.1), (0.25, 0.75)), |[_, tkd, dkd, ..], hard| {
            if hard { 0.25 * tkd + 0.75 * dkd } else { 0.9 * tkd + 0.1 * dkd }
        }),
        row(
            "cross entropy mixed in",
            kl.with_ce_weight(0.7).and_then(|o| o.with_kd_weight(0.3)),
            |[.., kl, ce], _| 0.3 * kl + 0.7 * ce,
        ),
        Paper {
            temperature: 2.0,
            ..row("temperature 2", kl.with_temperature(2.0), |[.., kl, _], _| kl)
        },
        Paper {
            temperature: 2.0,
            ..row(
                "temperature 2, squared",
                kl.with_temperature(2.0).map(|o| o.with_temperature_squared(true)),
                |[.., kl, _], _| 4.0 * kl,
            )
        },
        at_ratio("hard ratio 0", 0.0),
        at_ratio("hard ratio 0.1", 0.1),
        at_ratio("hard ratio 0.7", 0.7),
        at_ratio("hard ratio 1", 1.0),
        reduced("sum", Reduction::Sum, |_| 1.0),
        reduced("denominator 8", Reduction::Denominator(8.0), |_| 8.0),
    ]
}

/// The reference's selection and loss against [`Paper`], one token ignored.
fn by_the_paper(paper: &Paper, tokens: usize) -> Result<Worst> {
    const VOCAB: usize = 23;
    let mut case = random(tokens, VOCAB, tokens as u64).with(paper.objective.clone());
    case.labels[tokens / 2] = -100;
    let batch = Batch::new(Logits::new(&case.teacher, tokens, VOCAB)?, &case.labels)?;
    let student = Logits::new(&case.student, tokens, VOCAB)?;
    let output = reference::forward(&case.objective, &batch, student)?;

    let row = |logits: &[f32], i: usize| -> Vec<f64> {
        logits[i * VOCAB..][..VOCAB].iter().map(|&z| f64::from(z) / paper.temperature).collect()
    };
    let terms: Vec<(usize, [f64; 5])> = (0..tokens)
        .filter(|&i| case.labels[i] != -100)
        .map(|i| {
            let terms =
                textbook(&row(&case.teacher, i), &row(&case.student, i), case.labels[i] as usize);
            (i, terms)
        })
        .collect();
    let mut worst = Worst::new();
    let mut sum = 0.0;
    for &(i, token) in &terms {
        // A whole number of tokens is below ceil(x) exactly if it is below x.
        let before = terms
            .iter()
            .filter(|&&(j, other)| other[0] > token[0] || (other[0] == token[0] && j < i));
        let hard = (before.count() as f64) < paper.hard_ratio * terms.len() as f64;
        if output.tokens[i].hard != hard {
            return Ok(Worst::fail(format!("token {i}: hard {}, by the paper {hard}", !hard)));
        }
        sum += (paper.token)(token, hard);
    }
    let valid = output.tokens.iter().filter(|token| token.valid).count();
    worst.add(|| "valid tokens".into(), valid as f64, terms.len() as f64, 0.0);
    let expected = if terms.is_empty() { 0.0 } else { sum / (paper.divisor)(terms.len() as f64) };
    worst.add(|| "loss".into(), output.loss, expected, 1e-12 * (1.0 + expected));
    Ok(worst)
}

type Group = (&'static str, fn() -> Vec<Case>);

/// The cases that a backend runs.
const GROUPS: [Group; 9] = [
    ("shapes, dtypes, strides", shapes),
    ("objectives", objective_cases),
    ("selection", selections),
    ("edge cases", edges),
    ("finite masks", finite_masks),
    ("magnitudes", magnitudes),
    ("temperatures", temperatures),
    ("close models", close_models),
    ("sure teachers", sure_teachers),
];

/// Runs every case on a backend, a function as
/// [`cpu::forward_backward`](crate::cpu::forward_backward), and tells `report` of each as it ends.
pub fn run(
    backend: impl Fn(&Objective, &Batch, Logits, LogitsMut) -> Result<Output>,
    mut report: impl FnMut(&Check),
) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut add = |group, case: String, worst: Worst| {
        let check = Check { group, case, worst: worst.ratio, detail: worst.detail };
        report(&check);
        checks.push(check);
    };
    let caught =
        |worst: Result<Worst>| worst.unwrap_or_else(|e| Worst::fail(format!("error: {e}")));
    for (name, objective) in objectives() {
        // Differences cannot see the teacher's arg max in place of labels; identities need labels.
        let case = random(4, 7, 31).with(objective.map(|o| o.with_target(Target::Label)));
        add("reference: finite differences", name.into(), caught(differences(&case)));
    }
    for seed in 0..8 {
        let case = random(3, 23, seed);
        add("reference: textbook identities", format!("seed {seed}"), caught(identities(&case)));
    }
    for paper in paper() {
        for tokens in PAPER_TOKENS {
            let case = format!("{}, {tokens} tokens", paper.name);
            add("reference: the paper's table", case, caught(by_the_paper(&paper, tokens)));
        }
    }
    for (group, cases) in GROUPS {
        for case in cases() {
            let worst = case.run(&backend);
            add(group, case.name, worst);
        }
    }
    checks
}

/// Cases that [`run`] goes through, for a progress bar.
pub fn len() -> usize {
    objectives().len()
        + 8
        + paper().len() * PAPER_TOKENS.len()
        + GROUPS.iter().map(|(_, cases)| cases().len()).sum::<usize>()
}
