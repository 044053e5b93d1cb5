//! The candle operation against the float64 reference, and against candle's own differentiation of the
//! paper's definitions.

use atkd::battery::compare::{loss_within, term_within};
use atkd::candle::{
    KnownLogProbs, Tokens, loss, loss_with_output, sparse_loss, sparse_loss_with_output,
    token_entropies,
};
use atkd::{
    Batch, Logits, LogitsMut, Objective, Output, Reduction, SparseTeacher, Tail, cpu, reference,
};
use candle_core::{DType, Device, Result, Tensor, Var};

const CPU: &Device = &Device::Cpu;

fn random(shape: &[usize], dtype: DType, seed: u64) -> Tensor {
    let mut rng = fastrand::Rng::with_seed(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| 12.0 * rng.f32() - 6.0).collect();
    Tensor::from_vec(values, shape, CPU).unwrap().to_dtype(dtype).unwrap()
}

fn labels(shape: &[usize], vocab: i64, seed: u64) -> Tensor {
    let mut rng = fastrand::Rng::with_seed(seed);
    let values: Vec<i64> = (0..shape.iter().product()).map(|_| rng.i64(0..vocab)).collect();
    Tensor::from_vec(values, shape, CPU).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The float64 reference on the same, possibly rounded, logits.
fn expected(
    objective: &Objective,
    student: &Tensor,
    teacher: &Tensor,
    labels: &Tensor,
    own: Option<[&Tensor; 2]>,
) -> (Output, Vec<f64>) {
    let vocab = *student.dims().last().unwrap();
    let (s, t) = (values(student), values(teacher));
    let labels: Vec<i64> = labels.flatten_all().unwrap().to_vec1().unwrap();
    let teacher = Logits::new(&t, labels.len(), vocab).unwrap();
    let student = Logits::new(&s, labels.len(), vocab).unwrap();
    let mut batch = Batch::new(teacher, &labels).unwrap();
    let own = own.map(|own| own.map(values));
    if let Some([weights, temperatures]) = &own {
        batch = batch.with_token_weights(weights).unwrap().with_temperatures(temperatures).unwrap();
    }
    reference::forward_backward(objective, &batch, student).unwrap()
}

/// Asserts that loss and gradient are those of the reference, the gradient times `upstream`, to within
/// float32 rounding and `ulp` of an element.
fn check(objective: &Objective, student: &Var, teacher: &Tensor, labels: &Tensor, upstream: f64) {
    check_with(objective, student, teacher, labels, None, upstream);
}

/// Asserts the same with weights and temperatures of tokens.
fn check_with(
    objective: &Objective,
    student: &Var,
    teacher: &Tensor,
    labels: &Tensor,
    own: Option<[&Tensor; 2]>,
    upstream: f64,
) {
    let ulp = match student.dtype() {
        DType::BF16 => 2f64.powi(-7),
        DType::F16 => 2f64.powi(-10),
        _ => 0.0,
    };
    let (output, gradient) = expected(objective, student, teacher, labels, own);
    let mut tokens = Tokens::from(labels);
    if let Some([weights, temperatures]) = own {
        tokens = tokens.with_weights(weights).with_temperatures(temperatures);
    }
    let found = loss(objective, student, teacher, tokens).unwrap();
    assert_eq!((found.dtype(), found.dims()), (DType::F32, &[][..]));
    let value = f64::from(found.to_scalar::<f32>().unwrap());
    assert!((value - output.loss).abs() <= loss_within(output.loss, 1.0), "{value} {output:?}");

    let gradients = found.affine(upstream, 0.0).unwrap().backward().unwrap();
    let found = gradients.get(student).unwrap();
    assert_eq!((found.dtype(), found.dims()), (student.dtype(), student.dims()));
    let scale = gradient.iter().fold(0f64, |max, g| max.max((upstream * g).abs()));
    for (found, expected) in values(found).into_iter().zip(&gradient) {
        let expected = upstream * expected;
        let bound = 2e-6 * scale + ulp * expected.abs() + if ulp > 0.0 { 6e-8 } else { 0.0 };
        assert!((f64::from(found) - expected).abs() <= bound, "{found} {expected} {scale}");
    }
}

fn objectives() -> Vec<Objective> {
    let all = [Objective::default(), Objective::kl(), Objective::tkd(), Objective::dkd()];
    let mixed = |o: Objective| o.with_ce_weight(0.7).unwrap().with_temperature(2.0).unwrap();
    all.into_iter().chain(all.map(mixed)).collect()
}

#[test]
fn agrees_with_the_reference_for_every_dtype() {
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    for student_dtype in dtypes {
        for teacher_dtype in dtypes {
            for objective in objectives() {
                let student = Var::from_tensor(&random(&[9, 37], student_dtype, 1)).unwrap();
                let teacher = random(&[9, 37], teacher_dtype, 2);
                check(&objective, &student, &teacher, &labels(&[9], 37, 3), 1.0);
            }
        }
    }
}

#[test]
fn the_gradient_that_arrives_multiplies() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let student = Var::from_tensor(&random(&[5, 16], dtype, 4)).unwrap();
        let teacher = random(&[5, 16], dtype, 5);
        for upstream in [3.0, -0.25, 1.0 / 3.0] {
            check(&Objective::default(), &student, &teacher, &labels(&[5], 16, 6), upstream);
        }
    }
}

#[test]
fn weights_and_temperatures_of_tokens() {
    // Rows of a larger tensor, which are not contiguous.
    let own = random(&[3, 5, 2], DType::F32, 10);
    let weights = own.affine(0.3, 0.0).unwrap().narrow(2, 0, 1).unwrap().squeeze(2).unwrap();
    let temperatures = own.narrow(2, 1, 1).unwrap().squeeze(2).unwrap();
    let temperatures = temperatures.affine(0.25, 2.0).unwrap();
    let objective = Objective::default().with_ce_weight(0.7).unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let student = Var::from_tensor(&random(&[3, 5, 21], dtype, 7)).unwrap();
        let teacher = random(&[3, 5, 21], dtype, 8);
        let labels = labels(&[3, 5], 21, 9);
        for upstream in [1.0, -2.5] {
            let own = Some([&weights, &temperatures]);
            check_with(&objective, &student, &teacher, &labels, own, upstream);
        }
    }
}

/// A sparse teacher's loss is the CPU call's, as is its gradient times what arrives, in the student's dtype.
#[test]
fn sparse_teachers() {
    let (vocab, top_k) = (21_usize, 3);
    let indices: Vec<i64> =
        (0..10).flat_map(|i| [i, (i + 9) % 21, if i == 4 { -1 } else { 20 - i % 2 }]).collect();
    let indices = Tensor::from_vec(indices, &[2, 5, top_k], CPU).unwrap();
    // Rows of a larger tensor, which are not contiguous.
    let wide = random(&[2, 5, top_k + 1], DType::F32, 12).affine(0.1, -2.0).unwrap();
    let log_probs = wide.narrow(2, 1, top_k).unwrap();
    let of_targets = wide.narrow(2, 0, 1).unwrap().squeeze(2).unwrap();
    let labels = labels(&[2, 5], vocab as i64, 13);
    let weights = random(&[2, 5], DType::F32, 14);
    let objective = Objective::default().with_ce_weight(0.3).unwrap();
    let (known_at, known) =
        (indices.flatten_all().unwrap().to_vec1::<i64>().unwrap(), values(&log_probs));
    let (targets, own) = (values(&of_targets), values(&weights));
    let label_values: Vec<i64> = labels.flatten_all().unwrap().to_vec1().unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for tail in [Tail::Zero, Tail::Uniform, Tail::Bucket] {
            let student = Var::from_tensor(&random(&[2, 5, vocab], dtype, 15)).unwrap();
            let teacher = KnownLogProbs::new(&indices, &log_probs)
                .with_target_log_probs(&of_targets)
                .with_tail(tail);
            let tokens = Tokens::from(&labels).with_weights(&weights);
            let found = sparse_loss(&objective, &student, teacher, tokens).unwrap();
            let sparse = SparseTeacher::new(&known_at, &known, 10, top_k, vocab)
                .and_then(|teacher| teacher.with_target_log_probs(&targets))
                .unwrap()
                .with_tail(tail);
            let batch = Batch::new(sparse, &label_values).unwrap().with_token_weights(&own);
            let (logits, mut expected) = (values(&student), vec![0.0_f32; 10 * vocab]);
            let output = cpu::forward_backward(
                &objective,
                &batch.unwrap(),
                Logits::new(&logits, 10, vocab).unwrap(),
                LogitsMut::new(&mut expected, 10, vocab).unwrap(),
            )
            .unwrap();
            assert_eq!(found.to_scalar::<f32>().unwrap(), output.loss as f32, "{dtype:?} {tail:?}");
            let gradients = found.affine(-2.5, 0.0).unwrap().backward().unwrap();
            let gradient = gradients.get(&student).unwrap();
            assert_eq!((gradient.dtype(), gradient.dims()), (dtype, student.dims()));
            let ulp = match dtype {
                DType::BF16 => 2f32.powi(-7),
                DType::F16 => 2f32.powi(-10),
                _ => 0.0,
            };
            for (found, expected) in values(gradient).into_iter().zip(&expected) {
                let expected = -2.5 * expected;
                assert!(
                    (found - expected).abs() <= ulp * expected.abs() + 1e-7,
                    "{found} {expected}"
                );
            }
            // Without a gradient.
            let tokens = Tokens::from(&labels).with_weights(&weights);
            let (alone, terms) =
                sparse_loss_with_output(&objective, &student.detach(), teacher, tokens).unwrap();
            assert_eq!(alone.to_scalar::<f32>().unwrap(), output.loss as f32);
            assert_eq!(terms.tokens.len(), 10);
        }
    }

    let student = random(&[2, 5, vocab], DType::F32, 15);
    let teacher = KnownLogProbs::new(&indices, &log_probs);
    let fails = |teacher: KnownLogProbs, words: &[&str]| {
        let error = sparse_loss(&objective, &student, teacher, &labels).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    fails(teacher, &["token", "target", "3 indices"]);
    fails(KnownLogProbs::new(&log_probs, &log_probs), &["indices are F32", "integers"]);
    fails(KnownLogProbs::new(&indices, &wide), &["[2, 5, 4]", "[2, 5, 3]"]);
    let flat = indices.flatten_all().unwrap();
    fails(KnownLogProbs::new(&flat, &flat), &["[30]", "[2, 5, 21]", "[2, 5] and K"]);
    fails(teacher.with_target_log_probs(&wide), &["targets' log-probabilities", "[2, 5, 4]"]);
    fails(teacher.with_target_log_probs(&labels), &["targets' log-probabilities are I64", "F32"]);
    fails(KnownLogProbs::new(&indices, &indices), &["log-probabilities are I64", "BF16"]);
}

#[test]
fn entropies_of_tokens() {
    let logits = random(&[2, 3, 11], DType::BF16, 11);
    let entropies = token_entropies(&logits.narrow(1, 0, 2).unwrap(), 1.5).unwrap();
    assert_eq!((entropies.dtype(), entropies.dims()), (DType::F32, &[2, 2][..]));
    let exact = |row: usize| {
        let z: Vec<f64> =
            values(&logits)[row * 11..][..11].iter().map(|&z| f64::from(z) / 1.5).collect();
        let sum: f64 = z.iter().map(|z| z.exp()).sum();
        z.iter().map(|z| z.exp() / sum * (sum.ln() - z)).sum::<f64>()
    };
    for (found, row) in values(&entropies).into_iter().zip([0, 1, 3, 4]) {
        assert!((f64::from(found) - exact(row)).abs() <= 1e-5, "{found} {}", exact(row));
    }
    assert!(token_entropies(&logits, 0.0).is_err());
}

#[test]
fn a_scaled_loss_rescues_float16_gradients() {
    let objective = Objective::kl().with_reduction(Reduction::Denominator(1e7)).unwrap();
    let student = Var::from_tensor(&random(&[5, 16], DType::F16, 4)).unwrap();
    let teacher = random(&[5, 16], DType::F16, 5);
    check(&objective, &student, &teacher, &labels(&[5], 16, 6), 1e7);
}

#[test]
fn sequences_of_a_batch() {
    let student = Var::from_tensor(&random(&[3, 5, 21], DType::F32, 7)).unwrap();
    let teacher = random(&[3, 5, 21], DType::F32, 8);
    let labels = labels(&[3, 5], 21, 9);
    check(&Objective::default(), &student, &teacher, &labels, 1.0);
    let (_, output) = loss_with_output(&Objective::default(), &student, &teacher, &labels).unwrap();
    let (reference, _) = expected(&Objective::default(), &student, &teacher, &labels, None);
    assert_eq!(output.tokens.len(), 15);
    for (found, expected) in output.tokens.iter().zip(&reference.tokens) {
        assert_eq!((found.hard, found.valid), (expected.hard, expected.valid));
        assert!((found.loss - expected.loss).abs() <= term_within(expected.loss, 1.0));
        assert!(
            (found.uncertainty - expected.uncertainty).abs()
                <= term_within(expected.uncertainty, 1.0)
        );
    }
}

#[test]
fn labels_of_any_integer_dtype_and_ignored_ones() {
    let student = random(&[4, 16], DType::F32, 10);
    let teacher = random(&[4, 16], DType::F32, 11);
    let labels = Tensor::new(&[3i64, 0, 15, 7], CPU).unwrap();
    let objective = Objective::default().with_ignore_index(7);
    let value = |labels: &Tensor| {
        loss(&objective, &student, &teacher, labels).unwrap().to_scalar::<f32>().unwrap()
    };
    for dtype in [DType::U8, DType::U32, DType::I16, DType::I32] {
        assert_eq!(value(&labels), value(&labels.to_dtype(dtype).unwrap()));
    }
    let student = Var::from_tensor(&student).unwrap();
    check(&objective, &student, &teacher, &labels, 1.0);
    check(&objective, &student, &teacher, &Tensor::new(&[7i64; 4], CPU).unwrap(), 1.0);
}

/// Every view has the values of its own contiguous copy, which `check` has already compared.
#[test]
fn strided_views() {
    let objective = Objective::default().with_ce_weight(0.5).unwrap();
    let padded = random(&[4, 6, 24], DType::F32, 12);
    let columns = random(&[21, 24], DType::F32, 13).t().unwrap();
    let views = [
        padded.narrow(2, 2, 21).unwrap(),
        padded.narrow(1, 1, 5).unwrap(),
        padded.narrow(1, 3, 1).unwrap(),
        padded.narrow(0, 1, 2).unwrap().narrow(2, 3, 20).unwrap(),
        padded.transpose(0, 1).unwrap(),
        padded.transpose(1, 2).unwrap(),
        padded.narrow(0, 1, 1).unwrap().broadcast_as((4, 6, 24)).unwrap(),
        padded.narrow(0, 4, 0).unwrap(),
        columns.reshape((4, 6, 21)).unwrap(),
        columns,
    ];
    for view in views {
        let shape = view.dims();
        let labels = labels(&shape[..shape.len() - 1], shape[shape.len() - 1] as i64, 14);
        let other = random(shape, DType::F32, 15);
        let copy = Tensor::from_vec(values(&view), shape, CPU).unwrap();
        let value = |student: &Tensor, teacher: &Tensor| {
            loss(&objective, student, teacher, &labels).unwrap().to_scalar::<f32>().unwrap()
        };
        assert_eq!(value(&view, &other), value(&copy, &other), "{:?}", view.layout());
        assert_eq!(value(&other, &view), value(&other, &copy), "{:?}", view.layout());
    }
}

#[test]
fn gradients_flow_through_a_view() -> Result<()> {
    let padded = Var::from_tensor(&random(&[3, 6, 24], DType::F32, 16))?;
    let teacher = random(&[3, 5, 20], DType::F32, 17);
    let labels = labels(&[3, 5], 20, 18);
    let view = padded.narrow(1, 0, 5)?.narrow(2, 0, 20)?;
    let gradients = loss(&Objective::default(), &view, &teacher, &labels)?.backward()?;
    let found = gradients.get(&padded).unwrap();
    let (_, expected) = expected(&Objective::default(), &view, &teacher, &labels, None);
    for (found, expected) in values(&found.narrow(1, 0, 5)?.narrow(2, 0, 20)?).iter().zip(expected)
    {
        assert!((f64::from(*found) - expected).abs() <= 1e-7);
    }
    assert!(values(&found.narrow(1, 5, 1)?).iter().all(|g| *g == 0.0));
    assert!(values(&found.narrow(2, 20, 4)?).iter().all(|g| *g == 0.0));
    Ok(())
}

#[test]
fn an_untracked_student_has_the_same_loss_and_no_gradient() -> Result<()> {
    let teacher = Var::from_tensor(&random(&[5, 16], DType::F32, 20))?;
    let student = Var::from_tensor(&random(&[5, 16], DType::F32, 19))?;
    let labels = labels(&[5], 16, 21);
    let tracked = loss(&Objective::default(), &student, &teacher, &labels)?;
    let untracked = loss(&Objective::default(), &student.as_detached_tensor(), &teacher, &labels)?;
    assert!(tracked.track_op() && !untracked.track_op());
    assert_eq!(tracked.to_scalar::<f32>()?, untracked.to_scalar::<f32>()?);
    assert!(tracked.backward()?.get(&teacher).is_none());
    Ok(())
}

/// One tensor as teacher and student: nothing to learn, and no lock held twice.
#[test]
fn a_student_that_is_its_own_teacher() -> Result<()> {
    let logits = Var::from_tensor(&random(&[5, 16], DType::F32, 22))?;
    let loss = loss(&Objective::kl(), &logits, &logits, &labels(&[5], 16, 23))?;
    assert_eq!(loss.to_scalar::<f32>()?, 0.0);
    assert!(values(loss.backward()?.get(&logits).unwrap()).iter().all(|g| g.abs() < 1e-7));
    Ok(())
}

/// One token's parts in float64, from softmaxes, masks and logarithms, differentiable.
struct Parts {
    uncertainty: Tensor,
    tkd: Tensor,
    dkd: Tensor,
    kl: Tensor,
    ce: Tensor,
}

fn log_softmax(logits: &Tensor) -> Result<Tensor> {
    logits.broadcast_sub(&logits.exp()?.sum_keepdim(1)?.log()?)
}

fn parts(student: &Tensor, teacher: &Tensor, labels: &Tensor) -> Result<Parts> {
    let vocab = student.dim(1)? as u32;
    let target = Tensor::arange(0u32, vocab, CPU)?.to_dtype(DType::I64)?.unsqueeze(0)?;
    let target = target.broadcast_eq(&labels.unsqueeze(1)?)?.to_dtype(DType::F64)?;
    let others = target.affine(-1.0, 1.0)?;
    let (log_p, log_q) = (log_softmax(teacher)?, log_softmax(student)?);
    let split = |log: &Tensor| -> Result<(Tensor, Tensor, Tensor)> {
        let target_mass = (log.exp()? * &target)?.sum_keepdim(1)?;
        let rest = target_mass.affine(-1.0, 1.0)?;
        let renormalised = log.broadcast_sub(&rest.log()?)?;
        Ok((target_mass, rest, renormalised))
    };
    let ((p, p_rest, log_phat), (q, q_rest, log_qhat)) = (split(&log_p)?, split(&log_q)?);
    let tkd = ((&p * (p.log()? - q.log()?)?)? + (&p_rest * (p_rest.log()? - q_rest.log()?)?)?)?;
    let phat = (log_phat.exp()? * others)?;
    Ok(Parts {
        uncertainty: p_rest.squeeze(1)?,
        tkd: tkd.squeeze(1)?,
        dkd: (phat * (log_phat - log_qhat)?)?.sum(1)?,
        kl: (log_p.exp()? * (log_p - log_q)?)?.sum(1)?,
        ce: q.log()?.neg()?.squeeze(1)?,
    })
}

#[test]
fn agrees_with_candles_own_differentiation() -> Result<()> {
    let (tokens, vocab) = (8, 29);
    let logits = random(&[tokens, vocab], DType::F32, 24);
    let teacher = random(&[tokens, vocab], DType::F32, 25);
    let labels = labels(&[tokens], vocab as i64, 26);
    let wide = Var::from_tensor(&logits.to_dtype(DType::F64)?)?;
    let parts = parts(&wide, &teacher.to_dtype(DType::F64)?, &labels)?;

    let uncertainty = parts.uncertainty.to_vec1::<f64>()?;
    let mut ranked: Vec<usize> = (0..tokens).collect();
    ranked.sort_by(|&i, &j| uncertainty[j].total_cmp(&uncertainty[i]));
    let mut hard = vec![0f64; tokens];
    ranked[..tokens / 2].iter().for_each(|&token| hard[token] = 1.0);
    let hard = Tensor::new(hard, CPU)?;
    let lambda = 0.2;
    let hard_loss = (&hard * (&parts.tkd + &parts.dkd)?)?.affine(1.0 - lambda, 0.0)?;
    let easy_loss = (hard.affine(-1.0, 1.0)? * &parts.dkd)?.affine(lambda, 0.0)?;

    for (objective, expected) in [
        (Objective::default(), (hard_loss + easy_loss)?),
        (Objective::kl(), parts.kl.clone()),
        (Objective::tkd(), parts.tkd.clone()),
        (Objective::dkd(), parts.dkd.clone()),
        (Objective::kl().with_kd_weight(0.0).unwrap().with_ce_weight(1.0).unwrap(), parts.ce),
    ] {
        let expected = expected.mean(0)?;
        let expected_gradient = expected.backward()?.remove(&wide).unwrap();
        let student = Var::from_tensor(&logits)?;
        let found = loss(&objective, &student, &teacher, &labels)?;
        let (value, expected) = (found.to_scalar::<f32>()?, expected.to_scalar::<f64>()?);
        assert!(
            (f64::from(value) - expected).abs() <= loss_within(expected, 1.0),
            "{value} {expected}"
        );
        let gradient = found.backward()?.remove(&student).unwrap();
        let expected_gradient = values(&expected_gradient);
        for (found, expected) in values(&gradient).iter().zip(expected_gradient) {
            assert!((found - expected).abs() <= 5e-7, "{objective:?}: {found} {expected}");
        }
    }
    Ok(())
}

/// A step of gradient descent after another, as a training loop does it.
#[test]
fn descent_brings_the_student_to_the_teacher() -> Result<()> {
    let teacher = random(&[6, 12], DType::F32, 27);
    let labels = labels(&[6], 12, 28);
    let student = Var::zeros((6, 12), DType::F32, CPU)?;
    let objective = Objective::kl().with_reduction(Reduction::Sum).unwrap();
    let start = loss(&objective, &student, &teacher, &labels)?.to_scalar::<f32>()?;
    for _ in 0..500 {
        let gradients = loss(&objective, &student, &teacher, &labels)?.backward()?;
        student.set(&(student.as_tensor() - gradients.get(&student).unwrap())?)?;
    }
    let end = loss(&objective, &student, &teacher, &labels)?.to_scalar::<f32>()?;
    assert!(end < 0.01 * start, "{start} {end}");
    Ok(())
}

#[test]
fn errors_say_what_is_wrong() {
    let student = random(&[4, 16], DType::F32, 29);
    let teacher = random(&[4, 16], DType::F32, 30);
    let good = labels(&[4], 16, 31);
    let tensor = |labels: [i64; 4]| Tensor::new(&labels, CPU).unwrap();
    let cases = [
        (student.clone(), random(&[4, 15], DType::F32, 1), good.clone(), "[4, 16]"),
        (student.clone(), random(&[2, 2, 16], DType::F32, 1), good.clone(), "[2, 2, 16]"),
        (
            student.to_dtype(DType::F64).unwrap(),
            teacher.clone(),
            good.clone(),
            "student's logits are F64",
        ),
        (
            student.clone(),
            teacher.to_dtype(DType::F64).unwrap(),
            good.clone(),
            "teacher's logits are F64",
        ),
        (student.clone(), teacher.clone(), labels(&[5], 16, 1), "the labels are [5]"),
        (student.clone(), teacher.clone(), labels(&[2, 2], 16, 1), "the labels are [2, 2]"),
        (student.clone(), teacher.clone(), good.to_dtype(DType::F32).unwrap(), "must be integers"),
        (student.clone(), teacher.clone(), tensor([0, 1, 16, 3]), "label of token 2 is 16"),
        (student.clone(), teacher.clone(), tensor([0, -1, 5, 3]), "label of token 1 is -1"),
        (
            student.narrow(1, 0, 0).unwrap(),
            teacher.narrow(1, 0, 0).unwrap(),
            good.clone(),
            "vocabulary",
        ),
        (Tensor::new(1f32, CPU).unwrap(), Tensor::new(1f32, CPU).unwrap(), good.clone(), "scalar"),
    ];
    for (student, teacher, labels, message) in cases {
        for student in [student.clone(), Var::from_tensor(&student).unwrap().into_inner()] {
            let error = loss(&Objective::default(), &student, &teacher, &labels).unwrap_err();
            assert!(error.to_string().contains(message), "{error} should contain {message}");
        }
    }
}

#[test]
fn errors_of_tokens_values() {
    let logits = random(&[4, 16], DType::F32, 29);
    let labels = labels(&[4], 16, 31);
    let ones = |shape: &[usize], dtype| Tensor::ones(shape, dtype, CPU).unwrap();
    let (short, integers) = (ones(&[3], DType::F32), ones(&[4], DType::I64));
    let cold = ones(&[4], DType::F32).affine(0.0, 0.0).unwrap();
    let tokens = Tokens::from(&labels);
    for (tokens, message) in [
        (tokens.with_weights(&short), "the weights are [3]"),
        (tokens.with_temperatures(&short), "the temperatures are [3]"),
        (tokens.with_weights(&integers), "the weights are I64, but must be F32"),
        (tokens.with_temperatures(&integers), "the temperatures are I64, but must be F32"),
        (tokens.with_temperatures(&cold), "[1e-30, 1e30]"),
    ] {
        let error = loss(&Objective::default(), &logits, &logits, tokens).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}
