//! The loss from hidden states and weights on a device, against float64 of the products and the definitions.

#[path = "../layers/mod.rs"]
mod layers;

use std::io::Write;

use atkd::cuda::cudarc::driver::{CudaSlice, DeviceRepr};
use atkd::cuda::{
    DeviceElements, DeviceElementsMut, DeviceGradients, DeviceLayer, DeviceTokens, Head, Workspace,
};
use atkd::head::Chunks;
use atkd::{Dtype, Error, Objective, Reduction, Result};
use half::{bf16, f16};
use layers::*;

use super::Gpu;

/// A copy on the device.
enum OnDevice {
    F32(CudaSlice<f32>),
    F16(CudaSlice<f16>),
    Bf16(CudaSlice<bf16>),
}

impl OnDevice {
    fn new(gpu: &Gpu, data: &Data) -> Self {
        fn some<T: DeviceRepr + Default + Clone>(gpu: &Gpu, data: &[T]) -> CudaSlice<T> {
            // The driver refuses to allocate nothing.
            gpu.upload(&[data, &[T::default()]].concat())
        }
        match data {
            Data::F32(data) => Self::F32(some(gpu, data)),
            Data::F16(data) => Self::F16(some(gpu, data)),
            Data::Bf16(data) => Self::Bf16(some(gpu, data)),
        }
    }

    fn of(gpu: &Gpu, dtype: Dtype, count: usize) -> Self {
        let nan = Data::F32(vec![f32::NAN; count]);
        Self::new(
            gpu,
            &match dtype {
                Dtype::F32 => nan,
                Dtype::F16 => nan.to_f16(),
                Dtype::Bf16 => nan.to_bf16(),
            },
        )
    }

    fn elements(&self, count: usize) -> DeviceElements<'_> {
        match self {
            Self::F32(slice) => slice.slice(..count).into(),
            Self::F16(slice) => slice.slice(..count).into(),
            Self::Bf16(slice) => slice.slice(..count).into(),
        }
    }

    fn elements_mut(&mut self, count: usize) -> DeviceElementsMut<'_> {
        match self {
            Self::F32(slice) => slice.slice_mut(..count).into(),
            Self::F16(slice) => slice.slice_mut(..count).into(),
            Self::Bf16(slice) => slice.slice_mut(..count).into(),
        }
    }

    fn read(&self, gpu: &Gpu, count: usize) -> Vec<f64> {
        let mut data = match self {
            Self::F32(slice) => Data::F32(gpu.stream.clone_dtoh(slice).unwrap()),
            Self::F16(slice) => Data::F16(gpu.stream.clone_dtoh(slice).unwrap()),
            Self::Bf16(slice) => Data::Bf16(gpu.stream.clone_dtoh(slice).unwrap()),
        }
        .wide();
        data.truncate(count);
        data
    }
}

/// A model on the device.
struct Copied {
    hidden: OnDevice,
    weight: OnDevice,
    bias: Option<OnDevice>,
    counts: [usize; 3],
    features: usize,
}

impl Copied {
    fn new(gpu: &Gpu, model: &Model) -> Self {
        let count = |data: &Data| data.elements().len();
        Self {
            hidden: OnDevice::new(gpu, &model.hidden),
            weight: OnDevice::new(gpu, &model.weight),
            bias: model.bias.as_ref().map(|bias| OnDevice::new(gpu, bias)),
            counts: [
                count(&model.hidden),
                count(&model.weight),
                model.bias.as_ref().map_or(0, count),
            ],
            features: model.features,
        }
    }

    fn layer(&self) -> DeviceLayer<'_> {
        let [hidden, weight, bias] = self.counts;
        let (hidden, weight) = (self.hidden.elements(hidden), self.weight.elements(weight));
        let layer = DeviceLayer::new(hidden, weight, self.features).unwrap();
        match &self.bias {
            Some(of_bias) => layer.with_bias(of_bias.elements(bias)).unwrap(),
            None => layer,
        }
    }
}

struct Setup {
    gpu: Gpu,
    workspace: Workspace,
    /// The dtype of the gradient of the hidden states.
    dtype: Dtype,
}

impl Setup {
    fn or_skip() -> Option<Self> {
        let gpu = Gpu::new()?;
        match Head::new(&gpu.stream) {
            Err(error @ Error::NoCublas) => {
                let _ = writeln!(std::io::stderr(), "SKIPPED: {error}");
                return None;
            }
            head => drop(head.unwrap()),
        }
        let workspace = Workspace::new(&gpu.kernels, &gpu.stream, N).unwrap();
        Some(Self { gpu, workspace, dtype: Dtype::F32 })
    }

    fn found(
        &mut self,
        problem: &Problem,
        objective: &Objective,
        with: With,
        chunks: Chunks,
    ) -> Results {
        let gpu = &self.gpu;
        let vocab = problem.vocab();
        let (student, teacher) =
            (Copied::new(gpu, &problem.student), Copied::new(gpu, &problem.teacher));
        let [hidden, weight, _] = student.counts;
        let rows = weight / student.features;
        let labels = gpu.upload(&[&problem.labels[..], &[0]].concat());
        let mut tokens = DeviceTokens::new(labels.slice(..problem.labels.len()), vocab);
        let offsets = with.sequences.map(|offsets| {
            gpu.upload(&offsets.iter().map(|&offset| offset as i64).collect::<Vec<_>>())
        });
        if let Some(offsets) = &offsets {
            tokens = tokens.with_sequences(offsets.as_view()).unwrap();
        }
        let hard = with
            .hard
            .map(|hard| gpu.upload(&hard.iter().map(|&hard| u8::from(hard)).collect::<Vec<_>>()));
        if let Some(hard) = &hard {
            tokens = tokens.with_hard(hard.as_view()).unwrap();
        }
        let weights = with.weights.map(|weights| gpu.upload(weights));
        if let Some(weights) = &weights {
            tokens = tokens.with_token_weights(weights.as_view()).unwrap();
        }
        let temperatures = with.temperatures.map(|temperatures| gpu.upload(temperatures));
        if let Some(temperatures) = &temperatures {
            tokens = tokens.with_temperatures(temperatures.as_view()).unwrap();
        }
        let mut of_hidden = OnDevice::of(gpu, self.dtype, hidden);
        let mut of_weight = gpu.upload(&vec![f32::NAN; weight]);
        let mut of_bias = gpu.upload(&vec![f32::NAN; rows]);
        let gradients = DeviceGradients {
            hidden: Some(of_hidden.elements_mut(hidden)),
            weight: Some(of_weight.as_view_mut()),
            bias: Some(of_bias.as_view_mut()),
        };
        let mut head = Head::new(&gpu.stream).unwrap().with_chunks(chunks);
        let (student, teacher) = (student.layer(), teacher.layer());
        let (student, teacher) =
            (student.with_vocab(vocab).unwrap(), teacher.with_vocab(vocab).unwrap());
        let output = head
            .loss(&mut self.workspace, objective, tokens, &student, &teacher, gradients)
            .and_then(|workspace| workspace.read(&gpu.stream))
            .unwrap();
        gpu.context.check_err().unwrap();
        let wide = |slice: &CudaSlice<f32>| -> Vec<f64> {
            gpu.stream.clone_dtoh(slice).unwrap().into_iter().map(f64::from).collect()
        };
        let gradients = [of_hidden.read(gpu, hidden), wide(&of_weight), wide(&of_bias)];
        Results { output, gradients }
    }

    /// The first call, and one after another batch, whose threshold predicts wrongly for many tokens.
    #[track_caller]
    fn check(&mut self, problem: &Problem, objective: &Objective, with: With, chunk: usize) {
        let exact = problem.exactly(objective, with);
        self.workspace = Workspace::new(&self.gpu.kernels, &self.gpu.stream, N).unwrap();
        let other = other(problem);
        let mut found = |problem| self.found(problem, objective, with, Chunks::Tokens(chunk));
        compare(&found(problem), &exact);
        found(&other);
        compare(&found(problem), &exact);
    }
}

/// The same tokens and a teacher that is surer of them.
fn other(problem: &Problem) -> Problem {
    let larger = |data: &Data| Data::F32(data.wide().iter().map(|x| (2.0 * x) as f32).collect());
    let to_like = |data: &Data| match data {
        Data::F32(_) => larger(data),
        Data::F16(_) => larger(data).to_f16(),
        Data::Bf16(_) => larger(data).to_bf16(),
    };
    let Problem { student, teacher, labels, vocab } = problem;
    let teacher = Model { hidden: to_like(&teacher.hidden), ..teacher.clone() };
    Problem { student: student.clone(), teacher, labels: labels.clone(), vocab: *vocab }
}

/// Its threshold is another, so that the tests that predict by it have tokens to compute again.
#[test]
fn the_other_teacher_predicts_wrongly() {
    let (problem, objective) = (Problem::new(), Objective::default());
    let of = |problem: &Problem| problem.exactly(&objective, With::default()).output.tokens;
    let (tokens, other) = (of(&problem), of(&other(&problem)));
    let hard = other.iter().filter(|token| token.hard).map(|token| token.margin);
    let threshold = hard.fold(f64::INFINITY, f64::min);
    let wrong = tokens.iter().filter(|t| t.valid && t.hard != (t.margin >= threshold)).count();
    assert!(wrong >= 4, "{wrong} of {}", tokens.len());
}

#[test]
fn objectives_in_chunks() {
    let Some(mut setup) = Setup::or_skip() else { return };
    let problem = Problem::new();
    for objective in objectives() {
        for chunk in [7, 1000] {
            setup.check(&problem, &objective, With::default(), chunk);
        }
    }
    setup.check(&problem, &Objective::default(), With::default(), 1);
}

#[test]
fn sequences() {
    let Some(mut setup) = Setup::or_skip() else { return };
    let problem = Problem::new();
    let with = With { sequences: Some(&[0, 12, 12, 31, N]), ..With::default() };
    for objective in objectives() {
        setup.check(&problem, &objective, with, 7);
    }
}

#[test]
fn settings_of_tokens() {
    let Some(mut setup) = Setup::or_skip() else { return };
    let problem = Problem::new();
    let (weights, temperatures, hard) = values_of_tokens();
    let own =
        With { weights: Some(&weights), temperatures: Some(&temperatures), ..With::default() };
    for objective in objectives() {
        setup.check(&problem, &objective, own, 7);
        setup.check(&problem, &objective, With { hard: Some(&hard), ..own }, 7);
    }
}

/// The gradient of the logits is rounded once to half precision, and that of the hidden states once more if it is not
/// float32; the products are exact but for float32.
#[test]
fn half_precision() {
    let Some(mut setup) = Setup::or_skip() else { return };
    let mean_of = |denominator| {
        Objective::default().with_reduction(Reduction::Denominator(denominator)).unwrap()
    };
    // Half of a unit in the last place, relative; below the smallest normal number, half of the distance of all.
    for (to, dtype, half_ulp, smallest) in [
        (Data::to_f16 as fn(&Data) -> Data, Dtype::F16, 2f64.powi(-11), 2f64.powi(-25)),
        (Data::to_bf16, Dtype::Bf16, 2f64.powi(-8), 0.0),
    ] {
        let mut problem = Problem::new();
        (problem.student, problem.teacher) = (problem.student.map(to), problem.teacher.map(to));
        // Beside the power of two by which float16 gradients are multiplied.
        for (objective, unit) in [
            (Objective::default(), 32.0),
            (mean_of(65_536.0), 1024.0),
            (mean_of(1e-5), 2f64.powi(-17)),
        ] {
            let smallest = smallest / unit;
            // How far the gradients may be off by the rounding of the logits' gradients.
            let rounding = |with: With| {
                let (_, of_logits) = problem.of_logits(&objective, with);
                let rounding = |g: f64| (half_ulp * g.abs()).max(smallest);
                let roundings: Vec<f64> = of_logits.into_iter().map(rounding).collect();
                problem.gradients(&roundings, f64::abs)
            };
            let exact = problem.exactly(&objective, With::default());
            let of_right = rounding(With::default());
            // A repaired row's other gradient was added to the sums and taken from them, each time from logits of other
            // roundings.
            let hard: Vec<bool> = exact.output.tokens.iter().map(|token| !token.hard).collect();
            let of_other = rounding(With { hard: Some(&hard), ..With::default() });
            for of_hidden in [Dtype::F32, dtype] {
                setup.dtype = of_hidden;
                // That of the hidden states is rounded itself.
                let least = if of_hidden == Dtype::F16 { 2f64.powi(-25) } else { 0.0 };
                let ulp = if of_hidden == Dtype::F32 { 0.0 } else { 1.01 * half_ulp };
                // The gradient may be beyond float16's range.
                if of_hidden == Dtype::F16 && unit < 1.0 {
                    continue;
                }
                for first in [&problem, &other(&problem)] {
                    setup.found(first, &objective, With::default(), Chunks::Tokens(7));
                    let found =
                        setup.found(&problem, &objective, With::default(), Chunks::Tokens(7));
                    compare_output(&found.output, &exact.output);
                    for i in 0..3 {
                        let (found, exact) = (&found.gradients[i], &exact.gradients[i]);
                        let largest = exact.iter().fold(0.0, |most: f64, g| most.max(g.abs()));
                        for (j, (found, exact)) in found.iter().zip(exact).enumerate() {
                            let also = match i {
                                0 => (ulp * exact.abs()).max(least),
                                _ => of_other[i][j],
                            };
                            let allowed = of_right[i][j] + also + GRADIENT * largest;
                            let error = (found - exact).abs();
                            assert!(
                                error <= allowed,
                                "{i}: {found}, but {exact}: {error} {allowed}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Rows of the weight that are padding, of a number of their own, and no bias.
#[test]
fn padded_vocabularies() {
    let Some(mut setup) = Setup::or_skip() else { return };
    let mut problem = Problem::new();
    let objective = Objective::default();
    (problem.student.bias, problem.teacher.bias) = (None, None);
    let exact = problem.exactly(&objective, With::default());
    let pad = |model: &mut Model, rows: usize| {
        let Data::F32(weight) = &mut model.weight else { unreachable!() };
        weight.extend(vec![9.0; rows * model.features]);
    };
    pad(&mut problem.student, 3);
    pad(&mut problem.teacher, 14);
    problem.vocab = Some(V);
    let Results { output, gradients: [hidden, mut weight, mut bias] } =
        setup.found(&problem, &objective, With::default(), Chunks::Tokens(7));
    assert!(weight.drain(V * H..).chain(bias.drain(V..)).all(|g| g == 0.0));
    compare(&Results { output, gradients: [hidden, weight, bias] }, &exact);
}

#[test]
fn no_tokens() {
    let Some(mut setup) = Setup::or_skip() else { return };
    let objective = Objective::default();
    let mut ignored = Problem::new();
    ignored.labels.fill(-100);
    for problem in [ignored, Problem::of([0, V], [H, TEACHER_H], 1)] {
        let found = setup.found(&problem, &objective, With::default(), Chunks::default());
        assert_eq!(found.output.loss, 0.0);
        assert!(found.gradients.iter().flatten().all(|&g| g == 0.0));
    }
}

/// Hidden sizes by which no row starts at a multiple of 16 bytes.
#[test]
fn odd_sizes() {
    let Some(mut setup) = Setup::or_skip() else { return };
    let problem = Problem::of([11, 301], [7, 5], 3);
    for chunk in [1, 3] {
        setup.check(&problem, &Objective::default(), With::default(), chunk);
    }
}

#[test]
fn only_what_is_wanted_is_written() {
    let Some(mut setup) = Setup::or_skip() else { return };
    let (problem, objective) = (Problem::new(), Objective::default());
    let all = setup.found(&problem, &objective, With::default(), Chunks::Tokens(7));
    let gpu = &setup.gpu;
    let (student, teacher) =
        (Copied::new(gpu, &problem.student), Copied::new(gpu, &problem.teacher));
    let labels = gpu.upload(&problem.labels);
    let mut head = Head::new(&gpu.stream).unwrap().with_chunks(Chunks::Tokens(7));
    for wanted in 0..8 {
        let mut of_hidden = gpu.upload(&vec![f32::NAN; N * H]);
        let mut of_weight = gpu.upload(&vec![f32::NAN; V * H]);
        let mut of_bias = gpu.upload(&[f32::NAN; V]);
        let gradients = DeviceGradients {
            hidden: (wanted & 1 != 0).then(|| (&mut of_hidden).into()),
            weight: (wanted & 2 != 0).then(|| of_weight.as_view_mut()),
            bias: (wanted & 4 != 0).then(|| of_bias.as_view_mut()),
        };
        let tokens = DeviceTokens::new(&labels, V);
        let (student, teacher) = (student.layer(), teacher.layer());
        let workspace = &mut setup.workspace;
        let output = head
            .loss(workspace, &objective, tokens, &student, &teacher, gradients)
            .and_then(|workspace| workspace.read(&gpu.stream))
            .unwrap();
        assert!((output.loss - all.output.loss).abs() <= 1e-6 * all.output.loss);
        for (i, slice) in [&of_hidden, &of_weight, &of_bias].into_iter().enumerate() {
            let found = gpu.stream.clone_dtoh(slice).unwrap();
            if wanted & 1 << i == 0 {
                assert!(found.iter().all(|g| g.is_nan()));
                continue;
            }
            let found: Vec<f64> = found.into_iter().map(f64::from).collect();
            let largest = found.iter().fold(0.0, |most: f64, g| most.max(g.abs()));
            assert!(error(&found, &all.gradients[i]) <= 1e-6 * largest);
        }
    }
}

#[test]
fn mistakes_are_explained() {
    let Some(mut setup) = Setup::or_skip() else { return };
    let problem = Problem::new();
    let gpu = &setup.gpu;
    let labels = gpu.upload(&problem.labels);
    let workspace = &mut setup.workspace;
    let mut run = |student: &Model, teacher: &Model, chunks, of_hidden: Option<Dtype>| {
        let (student, teacher) = (Copied::new(gpu, student), Copied::new(gpu, teacher));
        let mut hidden = of_hidden.map(|dtype| OnDevice::of(gpu, dtype, N * H));
        let gradients = DeviceGradients {
            hidden: hidden.as_mut().map(|hidden| hidden.elements_mut(N * H)),
            ..DeviceGradients::default()
        };
        let tokens = DeviceTokens::new(&labels, V);
        let mut head = Head::new(&gpu.stream)?.with_chunks(chunks);
        let (student, teacher) = (student.layer(), teacher.layer());
        head.loss(workspace, &Objective::default(), tokens, &student, &teacher, gradients).map(drop)
    };
    let fails = |result: Result<()>, words: &[&str]| {
        let message = result.unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{word:?} is not in {message:?}");
        }
    };
    let Problem { student, teacher, .. } = &problem;
    fails(run(student, teacher, Chunks::Tokens(0), None), &["tokens of a chunk is 0"]);
    let mixed = Model { hidden: student.hidden.to_bf16(), ..student.clone() };
    let words = ["the dtype of the student's hidden states is BF16", "F32"];
    fails(run(&mixed, teacher, Chunks::default(), None), &words);
    let half = student.map(Data::to_bf16);
    let words = ["the dtype of the gradient of the hidden states is F16", "BF16", "F32"];
    fails(run(&half, teacher, Chunks::default(), Some(Dtype::F16)), &words);
    let narrow = Problem::of([N, 40], [H, TEACHER_H], 1).teacher;
    fails(run(student, &narrow, Chunks::default(), None), &["40 entries", "50", "with_vocab"]);
    run(student, teacher, Chunks::default(), None).unwrap();

    let other = DeviceTokens::new(&labels, V);
    let small = &mut Workspace::new(&gpu.kernels, &gpu.stream, 3).unwrap();
    let (student, teacher) = (Copied::new(gpu, student), Copied::new(gpu, teacher));
    let mut head = Head::new(&gpu.stream).unwrap();
    let (student, teacher) = (student.layer(), teacher.layer());
    let objective = Objective::default();
    let result =
        head.loss(small, &objective, other, &student, &teacher, DeviceGradients::default());
    fails(result.map(drop), &["the call has 60 tokens", "made for 3"]);
}
