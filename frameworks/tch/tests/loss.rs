//! The loss against the paper's definitions in float64, differentiated by PyTorch.

use atkd::{Objective, Reduction};
use atkd_tch::loss;
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

/// Numbers in [-3, 3) that do not repeat. (PyTorch's own have one seed for all tests at once.)
fn random(shape: &[i64], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        // Knuth's linear congruential generator.
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 * 6.0 - 3.0
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_slice(&values).reshape(shape)
}

fn labels(shape: &[i64]) -> Tensor {
    let count: i64 = shape.iter().product();
    let labels = (Tensor::arange(count, (Kind::Int64, CPU)) * 5).remainder(11);
    let _ = labels.get(2).fill_(-100);
    labels.reshape(shape)
}

/// ATKD with this lambda at this temperature, beside so much cross entropy: the mean over the tokens whose label is not
/// -100.
fn exact(
    [lambda, temperature, ce_weight]: [f64; 3],
    student: &Tensor,
    teacher: &Tensor,
    labels: &Tensor,
) -> Tensor {
    let vocab = student.size()[student.dim() - 1];
    let labels = labels.reshape([-1]);
    let valid = labels.ge(0).nonzero().reshape([-1]);
    let rows =
        |logits: &Tensor| logits.to_kind(Kind::Double).reshape([-1, vocab]).index_select(0, &valid);
    let (student, teacher) = (rows(student), rows(teacher));
    let label = labels.index_select(0, &valid).unsqueeze(1);
    let at_label = |values: &Tensor| values.gather(1, &label, false).squeeze_dim(1);
    let others = student.ones_like().scatter_value(1, &label, 0.0);
    let soft = |logits: &Tensor| (logits / temperature).softmax(-1, Kind::Double);
    let (p, q) = (soft(&teacher), soft(&student));
    let (p_label, q_label) = (at_label(&p), at_label(&q));
    let rest = |p: &Tensor| -> Tensor { 1.0 - p };
    let tkd = &p_label * (&p_label / &q_label).log()
        + rest(&p_label) * (rest(&p_label) / rest(&q_label)).log();
    let hat = |p: &Tensor, p_label: &Tensor| p / rest(p_label).unsqueeze(1);
    let (p_hat, q_hat) = (hat(&p, &p_label), hat(&q, &q_label));
    let dkd = ((&p_hat * (&p_hat / &q_hat).log()) * others).sum_dim_intlist(1, false, Kind::Double);
    let count = valid.size()[0];
    let (_, hard) = rest(&p_label).topk((count + 1) / 2, 0, true, true);
    let hard = p_label.zeros_like().scatter_value(0, &hard, 1.0);
    let kd = &hard * (1.0 - lambda) * (tkd + &dkd) + rest(&hard) * lambda * dkd;
    let cross_entropy = -at_label(&student.log_softmax(-1, Kind::Double));
    (kd + cross_entropy * ce_weight).mean(Kind::Double)
}

fn objective([lambda, temperature, ce_weight]: [f64; 3]) -> Objective {
    let objective = Objective::atkd(lambda).unwrap().with_temperature(temperature).unwrap();
    objective.with_ce_weight(ce_weight).unwrap()
}

/// Asserts that numbers are equal to within `relative` of each, and 2e-6.
fn close(found: &Tensor, expected: &Tensor, relative: f64) {
    assert_eq!(found.size(), expected.size());
    let (found, expected) = (found.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    let excess = (&found - &expected).abs() - (expected.abs() * relative + 2e-6);
    assert!(excess.max().double_value(&[]) <= 0.0, "{found:?} {expected:?}");
}

const SETTINGS: [[f64; 3]; 2] = [[0.2, 1.0, 0.0], [0.35, 2.0, 0.7]];

#[test]
fn loss_and_gradient_are_those_of_float64() {
    for settings in SETTINGS {
        for (kind, ulp) in [(Kind::Float, 0.0), (Kind::Half, 1e-3), (Kind::BFloat16, 8e-3)] {
            for upstream in [1.0, -2.5] {
                let student = random(&[2, 3, 11], 1).to_kind(kind).set_requires_grad(true);
                let teacher = random(&[2, 3, 11], 2).to_kind(kind);
                let labels = labels(&[2, 3]);
                let found = loss(&objective(settings), &student, &teacher, &labels).unwrap();
                assert_eq!((found.kind(), found.size()), (Kind::Float, vec![]));
                (&found * upstream).backward();
                let gradient = student.grad();
                assert_eq!(gradient.kind(), kind);

                let double = student.detach().to_kind(Kind::Double).set_requires_grad(true);
                let expected = exact(settings, &double, &teacher, &labels);
                close(&found, &expected, 0.0);
                (expected * upstream).backward();
                close(&gradient, &double.grad(), ulp);
                assert_eq!(gradient.get(0).get(2).abs().max().double_value(&[]), 0.0);
            }
        }
    }
}

/// A head whose weight gets its gradient through PyTorch's operations, from two losses.
#[test]
fn gradients_flow_through_the_graph() {
    let (hidden, teacher, labels) = (random(&[6, 4], 3), random(&[6, 11], 4), labels(&[6]));
    let gradient = |kind: Kind, loss: &dyn Fn(&Tensor) -> Tensor| {
        let weight = random(&[4, 11], 5).to_kind(kind).set_requires_grad(true);
        let logits = hidden.to_kind(kind).matmul(&weight);
        (loss(&logits) * 3.0 + logits.mean(None)).backward();
        weight.grad()
    };
    let found = gradient(Kind::Float, &|logits| {
        loss(&objective(SETTINGS[1]), logits, &teacher, &labels).unwrap()
    });
    let expected = gradient(Kind::Double, &|logits| exact(SETTINGS[1], logits, &teacher, &labels));
    assert!(expected.abs().max().double_value(&[]) > 0.1);
    close(&found, &expected, 1e-5);
}

/// Logits of -inf in both models, a masked vocabulary, have a gradient of 0 and do not touch the loss.
#[test]
fn a_masked_vocabulary() {
    let labels = labels(&[6]);
    let (student, teacher) = (random(&[6, 11], 6), random(&[6, 11], 7));
    let masked = |logits: &Tensor| {
        let padding = Tensor::full([6, 4], f64::NEG_INFINITY, (Kind::Float, CPU));
        Tensor::cat(&[logits, &padding], 1)
    };
    let settings = objective(SETTINGS[0]);
    let alone = loss(&settings, &student, &teacher, &labels).unwrap();
    let wide = masked(&student).set_requires_grad(true);
    let found = loss(&settings, &wide, &masked(&teacher), &labels).unwrap();
    close(&found, &alone, 0.0);
    found.backward();
    let gradient = wide.grad();
    assert_eq!(gradient.narrow(1, 11, 4).abs().max().double_value(&[]), 0.0);
    assert!(gradient.abs().max().double_value(&[]) > 0.01);
}

#[test]
fn views_and_who_is_tracked() {
    let (settings, labels) = (objective(SETTINGS[0]), labels(&[2, 3]));
    let teacher = random(&[2, 3, 11], 2).set_requires_grad(true);
    let whole = random(&[2, 4, 11], 8);
    for view in [whole.narrow(1, 0, 3), random(&[2, 11, 3], 9).transpose(1, 2)] {
        let constant = loss(&settings, &view, &teacher, &labels).unwrap();
        assert!(!constant.requires_grad());
        let copy = view.contiguous().set_requires_grad(true);
        let of_copy = loss(&settings, &copy, &teacher, &labels).unwrap();
        of_copy.backward();
        let view = view.detach().set_requires_grad(true);
        let of_view = loss(&settings, &view, &teacher, &labels).unwrap();
        of_view.backward();
        for value in [&of_view, &of_copy] {
            assert_eq!(value.double_value(&[]), constant.double_value(&[]));
        }
        assert_eq!(view.grad(), copy.grad());
    }
    assert!(!teacher.grad().defined(), "nothing flows back to the teacher");
}

/// A scaled loss rescues gradients that float16 has no numbers for.
#[test]
fn float16_gradients_that_arrive_scaled() {
    let student = random(&[6, 11], 1).to_kind(Kind::Half).set_requires_grad(true);
    let (teacher, labels) = (random(&[6, 11], 2), labels(&[6]));
    let tiny = Reduction::Denominator(5e9);
    let objective = objective(SETTINGS[0]).with_reduction(tiny).unwrap();
    (loss(&objective, &student, &teacher, &labels).unwrap() * 1e9).backward();
    let double = student.detach().to_kind(Kind::Double).set_requires_grad(true);
    exact(SETTINGS[0], &double, &teacher, &labels).backward();
    close(&student.grad(), &double.grad(), 1e-3);
}

#[test]
fn wrong_arguments_are_errors() {
    let (logits, right) = (random(&[6, 11], 1), labels(&[6]));
    let fails = |student: &Tensor, teacher: &Tensor, labels: &Tensor, words: &[&str]| {
        let message =
            loss(&Objective::default(), student, teacher, labels).unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    fails(&logits, &random(&[6, 12], 1), &right, &["teacher's logits", "[6, 12]", "[6, 11]"]);
    fails(&logits, &logits, &right.narrow(0, 1, 5), &["labels", "[5]", "[6]", "[6, 11]"]);
    fails(&logits, &logits, &(&right + 7), &["label", "11", "token"]);
    fails(&logits, &logits, &right.to_kind(Kind::Float), &["labels", "Float", "integers"]);
    fails(&logits.to_kind(Kind::Double), &logits, &right, &["student's logits", "Double"]);
    fails(&logits, &logits.to_kind(Kind::Double), &right, &["teacher's logits", "Double"]);
    fails(&logits.get(0).get(0), &logits, &right, &["student's logits", "scalar"]);
}
