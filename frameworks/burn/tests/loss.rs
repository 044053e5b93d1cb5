//! The operation against the paper's definitions in float64, written down here, and their finite differences.

use std::f64::consts::E;

use atkd::{Objective, Reduction};
use atkd_burn::{Error, Tokens, loss, loss_with_output};
use burn::tensor::quantization::QuantScheme;
use burn::tensor::{DType, Device, Int, IntDType, Tensor, TensorData, s};

/// Settings, for both sides.
#[derive(Clone, Copy, Debug)]
struct Settings {
    /// `None` for KL over the whole vocabulary.
    lambda: Option<f64>,
    temperature: f64,
    ce_weight: f64,
}

impl Settings {
    fn objective(self) -> Objective {
        let objective = match self.lambda {
            Some(lambda) => Objective::atkd(lambda).unwrap(),
            None => Objective::kl(),
        };
        let objective = objective.with_temperature(self.temperature).unwrap();
        objective.with_ce_weight(self.ce_weight).unwrap()
    }
}

const SETTINGS: [Settings; 3] = [
    Settings { lambda: Some(0.2), temperature: 1.0, ce_weight: 0.0 },
    Settings { lambda: Some(0.35), temperature: 2.0, ce_weight: 0.7 },
    Settings { lambda: None, temperature: 1.5, ce_weight: 0.3 },
];

/// Tokens in float64.
#[derive(Clone)]
struct Exact {
    student: Vec<f64>,
    teacher: Vec<f64>,
    labels: Vec<i64>,
    weights: Vec<f64>,
    temperatures: Vec<f64>,
}

impl Exact {
    fn new(student: &[f64], teacher: &[f64], labels: &[i64], settings: Settings) -> Self {
        let tokens = labels.len();
        let (student, teacher, labels) = (student.to_vec(), teacher.to_vec(), labels.to_vec());
        let temperatures = vec![settings.temperature; tokens];
        Self { student, teacher, labels, weights: vec![1.0; tokens], temperatures }
    }

    fn softmax(&self, logits: &[f64], token: usize, temperature: f64) -> Vec<f64> {
        let vocab = logits.len() / self.labels.len();
        let row = &logits[token * vocab..][..vocab];
        let powers: Vec<f64> = row.iter().map(|z| E.powf(z / temperature)).collect();
        let sum: f64 = powers.iter().sum();
        powers.iter().map(|power| power / sum).collect()
    }

    /// The mean loss over the tokens whose label is not -100.
    fn loss(&self, settings: Settings) -> f64 {
        let valid: Vec<usize> = (0..self.labels.len()).filter(|&i| self.labels[i] >= 0).collect();
        let soft = |logits, i: usize| self.softmax(logits, i, self.temperatures[i]);
        let uncertainty = |i: usize| 1.0 - soft(&self.teacher, i)[self.labels[i] as usize];
        let mut by_uncertainty = valid.clone();
        by_uncertainty.sort_by(|&a, &b| uncertainty(b).total_cmp(&uncertainty(a)));
        let hard = &by_uncertainty[..valid.len().div_ceil(2)];
        let of_token = |&i: &usize| {
            let (p, q) = (soft(&self.teacher, i), soft(&self.student, i));
            let label = self.labels[i] as usize;
            let (rest_p, rest_q) = (1.0 - p[label], 1.0 - q[label]);
            let tkd = p[label] * (p[label] / q[label]).ln() + rest_p * (rest_p / rest_q).ln();
            let dkd: f64 = (0..p.len())
                .filter(|&j| j != label)
                .map(|j| p[j] / rest_p * (p[j] / rest_p / (q[j] / rest_q)).ln())
                .sum();
            let kd = match settings.lambda {
                None => p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum(),
                Some(lambda) if hard.contains(&i) => (1.0 - lambda) * (tkd + dkd),
                Some(lambda) => lambda * dkd,
            };
            let cross_entropy = -self.softmax(&self.student, i, 1.0)[label].ln();
            self.weights[i] * (kd + settings.ce_weight * cross_entropy)
        };
        valid.iter().map(of_token).sum::<f64>() / valid.len() as f64
    }

    /// The derivatives by the student's logits: central differences, right to about 1e-9.
    fn gradient(&self, settings: Settings) -> Vec<f64> {
        const STEP: f64 = 1e-5;
        let mut moved = self.clone();
        let mut at = |i: usize, step: f64| {
            moved.student[i] = self.student[i] + step;
            let loss = moved.loss(settings);
            moved.student[i] = self.student[i];
            loss
        };
        (0..self.student.len()).map(|i| (at(i, STEP) - at(i, -STEP)) / (2.0 * STEP)).collect()
    }
}

/// Numbers in [-3, 3) that do not repeat.
fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        // Knuth's linear congruential generator.
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 * 6.0 - 3.0
    };
    (0..count).map(|_| next()).collect()
}

fn tensor<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let values = random(shape.iter().product(), seed);
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn cpu() -> Device {
    Device::flex()
}

fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
    let data = tensor.clone().cast(DType::F32).into_data();
    data.as_slice::<f32>().unwrap().iter().map(|&value| value.into()).collect()
}

fn integers(labels: &[i64], device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(labels.to_vec(), [labels.len()]), device)
}

/// Asserts that numbers are as expected, to within `relative` of each and `absolute`.
fn close(found: &[f64], expected: &[f64], [relative, absolute]: [f64; 2]) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let within = relative * expected.abs() + absolute;
        assert!((found - expected).abs() <= within, "{i}: {found} but {expected}, {within}");
    }
}

const LABELS: [i64; 6] = [3, 0, -100, 10, 5, 5];

#[test]
fn loss_and_gradient_are_those_of_float64() {
    for settings in SETTINGS {
        for (student_dtype, teacher_dtype, ulp) in [
            (DType::F32, DType::F32, 0.0),
            (DType::F32, DType::BF16, 0.0),
            (DType::F16, DType::F32, 2f64.powi(-10)),
            (DType::BF16, DType::F16, 2f64.powi(-7)),
        ] {
            for upstream in [1.0, -2.5] {
                let device = cpu().autodiff();
                let student = tensor([6, 11], 1, &cpu()).cast(student_dtype);
                let student = student.autodiff().require_grad();
                let teacher = tensor([6, 11], 2, &cpu()).cast(teacher_dtype);
                let exact = Exact::new(&values(&student), &values(&teacher), &LABELS, settings);
                let labels = integers(&LABELS, &device);
                let found = loss(&settings.objective(), student.clone(), teacher, labels).unwrap();
                assert_eq!((found.dtype(), found.dims()), (DType::F32, [1]));
                close(&values(&found), &[exact.loss(settings)], [1e-6, 2e-7]);

                let gradients = found.mul_scalar(upstream).backward();
                let gradient = student.grad(&gradients).unwrap();
                assert_eq!((gradient.dtype(), gradient.dims()), (student_dtype, [6, 11]));
                let expected: Vec<f64> =
                    exact.gradient(settings).iter().map(|g| upstream * g).collect();
                close(&values(&gradient), &expected, [ulp, 2e-6]);
                assert!(values(&gradient)[22..33].iter().all(|&g| g == 0.0), "the ignored token's");
            }
        }
    }
}

/// A head of 4 inputs, whose weight gets its gradient through burn's own operations, from two losses.
#[test]
fn gradients_flow_through_the_graph() {
    let settings = SETTINGS[1];
    let device = cpu().autodiff();
    let weight = tensor([4, 11], 3, &device).require_grad();
    let hidden = tensor([2, 3, 4], 4, &device);
    let teacher = tensor([2, 3, 11], 5, &cpu());
    let logits = hidden.clone().matmul(weight.clone().unsqueeze::<3>());
    let labels = integers(&LABELS, &device).reshape([2, 3]);
    let found = loss(&settings.objective(), logits.clone(), teacher.clone(), labels).unwrap();
    let sum = found.mul_scalar(3.0) + logits.mean().mul_scalar(0.5);
    let gradient = weight.grad(&sum.backward()).unwrap();

    let (w, h, t) = (values(&weight), values(&hidden), values(&teacher));
    let total = |w: &[f64]| {
        let logits: Vec<f64> = (0..6 * 11)
            .map(|i| (0..4).map(|k| h[i / 11 * 4 + k] * w[k * 11 + i % 11]).sum())
            .collect();
        let mean = logits.iter().sum::<f64>() / logits.len() as f64;
        3.0 * Exact::new(&logits, &t, &LABELS, settings).loss(settings) + 0.5 * mean
    };
    let expected: Vec<f64> = (0..w.len())
        .map(|i| {
            let moved = |step: f64| {
                let mut w = w.clone();
                w[i] += step;
                total(&w)
            };
            (moved(1e-5) - moved(-1e-5)) / 2e-5
        })
        .collect();
    assert!(expected.iter().any(|g| g.abs() > 0.1));
    close(&values(&gradient), &expected, [1e-5, 1e-5]);
}

#[test]
fn weights_and_temperatures_of_tokens() {
    let settings = SETTINGS[1];
    let device = cpu().autodiff();
    let student = tensor([2, 3, 11], 6, &device).require_grad();
    let teacher = tensor([2, 3, 11], 7, &device);
    let weights = tensor([2, 3], 8, &device);
    let temperatures = tensor([2, 3], 9, &device).mul_scalar(0.3).add_scalar(1.5);
    let exact = Exact {
        weights: values(&weights),
        temperatures: values(&temperatures),
        ..Exact::new(&values(&student), &values(&teacher), &LABELS, settings)
    };
    let labels = integers(&LABELS, &device).reshape([2, 3]);
    let tokens = Tokens::from(labels).with_weights(weights).with_temperatures(temperatures);
    let (found, output) =
        loss_with_output(&settings.objective(), student.clone(), teacher, tokens).unwrap();
    close(&values(&found), &[exact.loss(settings)], [1e-6, 2e-7]);
    let gradient = student.grad(&found.backward()).unwrap();
    close(&values(&gradient), &exact.gradient(settings), [0.0, 2e-6]);
    let terms = &output.tokens;
    assert_eq!(terms.iter().map(|token| token.valid).collect::<Vec<_>>(), LABELS.map(|l| l >= 0));
    assert_eq!(terms.iter().filter(|token| token.hard).count(), 3);
    let mean = terms.iter().map(|token| token.loss).sum::<f64>() / 5.0;
    close(&[mean], &[exact.loss(settings)], [1e-6, 2e-7]);
}

/// Without a graph there is no gradient, and the same loss.
#[test]
fn who_is_tracked() {
    let objective = Objective::default();
    let device = cpu().autodiff();
    let (student, teacher) = (tensor([6, 11], 1, &cpu()), tensor([6, 11], 2, &cpu()));
    let labels = || integers(&LABELS, &cpu());
    let alone = loss(&objective, student.clone(), teacher.clone(), labels()).unwrap();
    assert!(!alone.is_autodiff());

    let constant = student.clone().autodiff();
    let untracked = loss(&objective, constant, teacher.clone(), labels()).unwrap();
    assert!(untracked.is_autodiff() && !untracked.is_tracked());
    assert_eq!(values(&untracked), values(&alone));

    // Nothing flows back to a teacher, though it asks for it.
    let student = student.autodiff().require_grad();
    let teacher = teacher.autodiff().require_grad();
    let tracked = loss(&objective, student.clone(), teacher.clone(), labels()).unwrap();
    assert_eq!(values(&tracked), values(&alone));
    let gradients = tracked.backward();
    assert!(teacher.grad(&gradients).is_none());
    let gradient = values(&student.grad(&gradients).unwrap());

    let checkpointing = device.gradient_checkpointing();
    let student = tensor([6, 11], 1, &checkpointing).require_grad();
    let checkpointed = loss(&objective, student.clone(), teacher.inner(), labels()).unwrap();
    assert_eq!(values(&checkpointed), values(&alone));
    assert_eq!(values(&student.grad(&checkpointed.backward()).unwrap()), gradient);
}

/// A scaled loss rescues gradients that float16 has no numbers for.
#[test]
fn float16_gradients_that_arrive_scaled() {
    let objective = Objective::kl().with_reduction(Reduction::Denominator(1e9)).unwrap();
    let settings = Settings { lambda: None, temperature: 1.0, ce_weight: 0.0 };
    let labels = [1; 6];
    let student = tensor([6, 11], 1, &cpu()).cast(DType::F16).autodiff().require_grad();
    let teacher = tensor([6, 11], 2, &cpu());
    let exact = Exact::new(&values(&student), &values(&teacher), &labels, settings);
    let labels = integers(&labels, &cpu());
    let found = loss(&objective, student.clone(), teacher, labels).unwrap();
    let gradient = student.grad(&found.mul_scalar(1e9 / 6.0).backward()).unwrap();
    close(&values(&gradient), &exact.gradient(settings), [2f64.powi(-10), 2e-6]);
}

#[test]
fn labels_of_any_integer_dtype() {
    let labels = [3, 0, 7, 10, 5, 5];
    let value = |dtype: IntDType| {
        let (student, teacher) = (tensor([6, 11], 1, &cpu()), tensor([6, 11], 2, &cpu()));
        let labels = integers(&labels, &cpu()).cast(dtype);
        values(&loss(&Objective::default(), student, teacher, labels).unwrap())
    };
    let expected = value(IntDType::I64);
    for dtype in [IntDType::I32, IntDType::I16, IntDType::I8, IntDType::U32, IntDType::U8] {
        assert_eq!(value(dtype), expected);
    }
}

/// A view, read where it lies or copied, counts as its own copy does.
#[test]
fn views() {
    let whole = tensor([4, 6, 24], 1, &cpu());
    for view in [
        whole.clone().slice(s![.., ..-1]),
        whole.clone().slice(s![1..3, 2.., 3..20]),
        whole.clone().slice(s![.., 2..3]),
        whole.clone().swap_dims(0, 1),
        whole.clone().swap_dims(1, 2),
        whole.clone().flip([1]),
        whole.clone().slice(s![0..1]).expand([4, 6, 24]),
    ] {
        let [batch, time, vocab] = view.dims();
        let copy = || {
            let data = view.clone().into_data();
            Tensor::<3>::from_data(
                TensorData::new(data.as_slice::<f32>().unwrap().to_vec(), view.shape()),
                &cpu(),
            )
        };
        let other = tensor([batch, time, vocab], 2, &cpu());
        let labels: Vec<i64> = (0..batch * time).map(|i| (i % vocab) as i64).collect();
        let labels = integers(&labels, &cpu()).reshape([batch, time]);
        let call = |student: Tensor<3>, teacher: Tensor<3>| {
            let student = student.autodiff().require_grad();
            let loss =
                loss(&Objective::default(), student.clone(), teacher, labels.clone()).unwrap();
            (values(&loss), values(&student.grad(&loss.backward()).unwrap()))
        };
        assert_eq!(call(view.clone(), other.clone()), call(copy(), other.clone()));
        assert_eq!(call(other.clone(), view.clone()), call(other, copy()));
    }
}

#[test]
fn an_empty_batch() {
    let student = Tensor::<2>::zeros([0, 11], &cpu()).autodiff().require_grad();
    let teacher = Tensor::zeros([0, 11], &cpu());
    let found =
        loss(&Objective::default(), student.clone(), teacher, integers(&[], &cpu())).unwrap();
    assert_eq!(values(&found), [0.0]);
    assert_eq!(student.grad(&found.backward()).unwrap().dims(), [0, 11]);
}

#[test]
fn wrong_arguments_are_errors() {
    let device = cpu().autodiff();
    let call = |student: Tensor<2>, teacher: Tensor<2>, tokens: Tokens<1>| {
        loss(&Objective::default(), student, teacher, tokens).map(|loss| values(&loss))
    };
    let logits = || tensor([6, 11], 1, &device).require_grad();
    let labels = |labels: &[i64]| Tokens::from(integers(labels, &device));
    let fails = |found: Result<Vec<f64>, Error>, words: &[&str]| {
        let message = found.unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    fails(
        call(logits(), tensor([6, 12], 1, &device), labels(&LABELS)),
        &["teacher's logits", "[6, 12]", "[6, 11]"],
    );
    fails(call(logits(), logits(), labels(&LABELS[1..])), &["labels", "[5]", "[6]", "[6, 11]"]);
    fails(call(logits(), logits(), labels(&[3, 0, 11, 1, 1, 1])), &["token 2", "11"]);
    fails(call(logits(), logits(), labels(&[3, 0, -1, 1, 1, 1])), &["token 2", "-1", "-100"]);
    let double =
        || Tensor::<2>::from_data(TensorData::new(vec![0f64; 66], [6, 11]), (&cpu(), DType::F64));
    fails(call(double(), logits(), labels(&LABELS)), &["student's logits", "F64", "BF16"]);
    fails(call(logits(), double(), labels(&LABELS)), &["teacher's logits", "F64", "BF16"]);
    let quantized = || tensor([6, 11], 1, &cpu()).quantize_dynamic(&QuantScheme::default());
    fails(call(quantized(), logits(), labels(&LABELS)), &["student's logits", "QFloat", "BF16"]);
    let weights = labels(&LABELS).with_weights(tensor([5], 1, &device));
    fails(call(logits(), logits(), weights), &["weights", "[5]", "[6]"]);
    let weights = labels(&LABELS).with_weights(tensor([6], 1, &device).cast(DType::F16));
    fails(call(logits(), logits(), weights), &["weights", "F16", "F32"]);
    let temperatures = labels(&LABELS).with_temperatures(Tensor::zeros([6], &device));
    fails(call(logits(), logits(), temperatures), &["temperature", "0"]);
    // Labels of two dimensions for logits of two.
    let labels = integers(&LABELS, &device).reshape([6, 1]);
    let found = loss(&Objective::default(), logits(), logits(), labels);
    fails(found.map(|loss| values(&loss)), &["labels", "[6, 1]", "[6]"]);
}

/// NdArray stands for every other backend.
#[test]
#[expect(
    deprecated,
    reason = "burn takes Flex in NdArray's place, but the others take minutes to build"
)]
fn another_backend_is_an_error() {
    let logits = |device: &Device| tensor([6, 11], 1, device);
    let call = |student: Tensor<2>, teacher: Tensor<2>, labels: Tensor<1, Int>| {
        loss(&Objective::default(), student, teacher, labels).unwrap_err()
    };
    for other in [Device::ndarray(), Device::ndarray().autodiff()] {
        let error = call(logits(&other), logits(&other), integers(&LABELS, &other));
        assert!(matches!(error, Error::Backend { .. }), "{error}");
        assert!(error.to_string().contains("Flex"), "{error}");
        let flex = cpu().autodiff();
        let error = call(logits(&flex), logits(&other), integers(&LABELS, &flex));
        assert!(matches!(error, Error::Device { what: "teacher's logits", .. }), "{error}");
        let error = call(logits(&flex), logits(&flex), integers(&LABELS, &other));
        assert!(matches!(error, Error::Device { what: "labels", .. }), "{error}");
    }
}

/// A tensor that is moved to Flex keeps its graph: its gradient is on its own backend.
#[test]
#[expect(
    deprecated,
    reason = "burn takes Flex in NdArray's place, but the others take minutes to build"
)]
fn logits_that_are_moved_here_are_tracked() {
    let settings = SETTINGS[0];
    let other = Device::ndarray().autodiff();
    let student = tensor([6, 11], 1, &other).require_grad();
    let teacher = tensor([6, 11], 2, &cpu());
    let exact = Exact::new(&values(&student), &values(&teacher), &LABELS, settings);
    let labels = integers(&LABELS, &cpu());
    let moved = student.clone().to_device(&cpu().autodiff());
    let found = loss(&settings.objective(), moved, teacher, labels).unwrap();
    let gradient = student.grad(&found.backward()).unwrap();
    assert_eq!(gradient.device(), Device::ndarray());
    close(&values(&gradient), &exact.gradient(settings), [0.0, 2e-6]);
}
