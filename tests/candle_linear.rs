//! The candle operation on hidden states and weights, against candle's own products and the operation on logits.

use atkd::candle::{Layer, Tokens, linear_loss, linear_loss_with_output, loss, loss_with_output};
use atkd::head::Chunks;
use atkd::{Objective, Reduction};
use candle_core::{DType, Device, Result, Tensor, Var};

const CPU: &Device = &Device::Cpu;
const V: usize = 40;

fn random(shape: &[usize], dtype: DType, seed: u64) -> Tensor {
    let mut rng = fastrand::Rng::with_seed(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| 3.0 * rng.f32() - 1.5).collect();
    Tensor::from_vec(values, shape, CPU).unwrap().to_dtype(dtype).unwrap()
}

/// Hidden states, weight and bias.
fn layer(shape: &[usize], features: usize, dtype: DType, seed: u64) -> [Var; 3] {
    let hidden = [shape, &[features]].concat();
    [(hidden, 0), (vec![V, features], 1), (vec![V], 2)]
        .map(|(shape, i)| Var::from_tensor(&random(&shape, dtype, seed + i)).unwrap())
}

/// A label in seven is ignored.
fn labels(shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let label = |i: usize| if i % 7 == 2 { -100 } else { (i * 11 % V) as i64 };
    Tensor::from_vec((0..count).map(label).collect(), shape, CPU).unwrap()
}

/// The logits in float32, by candle.
fn logits([hidden, weight, bias]: &[Var; 3]) -> Result<Tensor> {
    let (hidden, weight) = (hidden.to_dtype(DType::F32)?, weight.to_dtype(DType::F32)?);
    hidden.broadcast_matmul(&weight.t()?)?.broadcast_add(&bias.to_dtype(DType::F32)?)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn close(found: &Tensor, expected: &Tensor, allowed: f32) {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (values(found), values(expected));
    let largest = expected.iter().fold(0f32, |most, g| most.max(g.abs()));
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() <= allowed * largest, "{found} {expected} {largest}");
    }
}

#[test]
fn agrees_with_the_loss_of_logits() -> Result<()> {
    let group_mean = Objective::default().with_reduction(Reduction::GroupMean).unwrap();
    let mixed = Objective::default().with_ce_weight(0.5).unwrap().with_temperature(2.0).unwrap();
    for (dtype, rounding) in [(DType::F32, 0.0), (DType::F16, 1e-3), (DType::BF16, 8e-3)] {
        for shape in [&[23][..], &[3, 8]] {
            let student = layer(shape, 9, dtype, 1);
            let teacher = layer(shape, 14, DType::F32, 5);
            let labels = labels(shape);
            for objective in [Objective::default(), Objective::kl(), group_mean, mixed] {
                let expected = loss(&objective, &logits(&student)?, &logits(&teacher)?, &labels)?;
                let expected = expected.affine(-2.5, 0.0)?;
                let gradients = expected.backward()?;
                for chunks in [Chunks::Tokens(1), Chunks::Tokens(5), Chunks::default()] {
                    let [hidden, weight, bias] = &student;
                    let of_student = Layer::new(hidden, weight).with_bias(bias);
                    let of_teacher = Layer::new(&teacher[0], &teacher[1]).with_bias(&teacher[2]);
                    let found = linear_loss(&objective, of_student, of_teacher, &labels, chunks)?;
                    let found = found.affine(-2.5, 0.0)?;
                    close(&found, &expected, 1e-5);
                    let found = found.backward()?;
                    for var in &student {
                        let gradient = found.get(var).unwrap();
                        assert_eq!(gradient.dtype(), dtype);
                        close(gradient, gradients.get(var).unwrap(), 2e-5 + rounding);
                    }
                    assert!(teacher.iter().all(|var| found.get(var).is_none()));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn only_what_is_tracked_has_a_gradient() -> Result<()> {
    let (student, teacher) = (layer(&[12], 6, DType::F32, 1), layer(&[12], 6, DType::F32, 5));
    let (objective, labels) = (Objective::default(), labels(&[12]));
    let of_teacher = Layer::new(&teacher[0], &teacher[1]);
    let [hidden, weight, _] = &student;
    let run = |hidden: &Tensor, weight: &Tensor| {
        let student = Layer::new(hidden, weight);
        linear_loss(&objective, student, of_teacher, &labels, Chunks::Tokens(5))
    };
    let whole = run(hidden, weight)?;
    let all = whole.backward()?;
    let frozen = weight.as_detached_tensor();
    let found = run(hidden, &frozen)?.backward()?;
    assert_eq!(values(found.get(hidden).unwrap()), values(all.get(hidden).unwrap()));
    assert!(found.get(&frozen).is_none());
    let fixed = hidden.as_detached_tensor();
    let found = run(&fixed, weight)?.backward()?;
    assert_eq!(values(found.get(weight).unwrap()), values(all.get(weight).unwrap()));
    assert!(!run(&fixed, &frozen)?.track_op());
    // A weight that the model uses elsewhere too, and hidden states that are computed.
    let tied = (run(&hidden.affine(2.0, 0.0)?, weight)? + weight.sum_all()?)?.backward()?;
    let doubled = Var::from_tensor(&hidden.affine(2.0, 0.0)?)?;
    let alone = run(&doubled, weight)?.backward()?;
    close(tied.get(weight).unwrap(), &alone.get(weight).unwrap().affine(1.0, 1.0)?, 1e-6);
    close(tied.get(hidden).unwrap(), &alone.get(&doubled).unwrap().affine(2.0, 0.0)?, 1e-6);
    Ok(())
}

#[test]
fn weights_temperatures_and_terms_of_tokens() -> Result<()> {
    let (student, teacher) = (layer(&[4, 5], 6, DType::F32, 1), layer(&[4, 5], 6, DType::F32, 5));
    let labels = labels(&[4, 5]);
    let weights = random(&[4, 5], DType::F32, 10);
    let temperatures = random(&[4, 5], DType::F32, 11).affine(0.3, 1.0)?;
    let tokens = Tokens::from(&labels).with_weights(&weights).with_temperatures(&temperatures);
    let objective = Objective::default();
    let (expected, of_logits) =
        loss_with_output(&objective, &logits(&student)?, &logits(&teacher)?, tokens)?;
    // Neither is contiguous.
    let weight = student[1].t()?.contiguous()?.t()?;
    let hidden = student[0].transpose(0, 1)?.contiguous()?.transpose(0, 1)?;
    let of_student = Layer::new(&hidden, &weight).with_bias(&student[2]);
    let of_teacher = Layer::new(&teacher[0], &teacher[1]).with_bias(&teacher[2]);
    let (found, output) =
        linear_loss_with_output(&objective, of_student, of_teacher, tokens, Chunks::Tokens(3))?;
    close(&found, &expected, 1e-5);
    for (found, expected) in output.tokens.iter().zip(&of_logits.tokens) {
        assert_eq!(found.hard, expected.hard);
        assert!((found.loss - expected.loss).abs() <= 1e-5);
    }
    let (found, expected) = (found.backward()?, expected.backward()?);
    for var in &student {
        close(found.get(var).unwrap(), expected.get(var).unwrap(), 2e-5);
    }
    Ok(())
}

#[test]
fn mistakes_are_explained() {
    let (student, teacher) = (layer(&[6], 4, DType::F32, 1), layer(&[6], 5, DType::F32, 5));
    let labels = labels(&[6]);
    let objective = Objective::default();
    let fails = |student: Layer, teacher: Layer, labels: &Tensor, chunks, words: &[&str]| {
        let result = linear_loss(&objective, student, teacher, labels, chunks);
        let message = result.unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{word:?} is not in {message:?}");
        }
    };
    let of_student = Layer::new(&student[0], &student[1]);
    let of_teacher = Layer::new(&teacher[0], &teacher[1]);
    let whole = Chunks::default();
    fails(of_student, of_teacher, &labels, Chunks::Tokens(0), &["tokens of a chunk is 0"]);
    let mixed_up = Layer::new(&student[0], &teacher[1]);
    fails(mixed_up, of_teacher, &labels, whole, &["student's weight is [40, 5]", "[vocab, 4]"]);
    let few = random(&[30, 5], DType::F32, 9);
    let narrow = Layer::new(&teacher[0], &few);
    fails(of_student, narrow, &labels, whole, &["[40, 4]", "[30, 5]", "one vocabulary"]);
    let biased = of_student.with_bias(&student[0]);
    fails(biased, of_teacher, &labels, whole, &["student's bias is [6, 4]", "[40]"]);
    let short = labels.narrow(0, 0, 5).unwrap();
    fails(of_student, of_teacher, &short, whole, &["labels are [5]", "hidden states [6, 4]"]);
    let wide = student[0].to_dtype(DType::F64).unwrap();
    fails(Layer::new(&wide, &student[1]), of_teacher, &labels, whole, &["F64", "BF16"]);
    let beyond = labels.affine(100.0, 0.0).unwrap();
    fails(of_student, of_teacher, &beyond, whole, &["vocabulary size 40"]);
}
