//! The loss of [`atkd`] on the CPU tensors of [tch](https://docs.rs/tch), PyTorch's C++ library from Rust.
//!
//! tch has no custom functions for autograd. But the loss comes with its gradient G, and the derivative of the inner product
//! of the student's logits and G, by the logits, is G: so that product goes through autograd in the loss's place. Its value
//! is then overwritten by the loss, behind autograd's back, since a product's derivative does not depend on it.
//!
//! The tensors are known to [`atkd::cpu::raw`] by their addresses alone, in the same way as those of any other framework.

use std::error::Error;

use atkd::call::{RawCall, RawLabels, RawLogits, RawOutput};
use atkd::cpu::raw;
use atkd::{Dtype, Objective, Strides};
use tch::{Device, Kind, Tensor};

/// A [`Result`](std::result::Result) with an error of atkd, of tch or in words.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The loss of the student's logits in nats, a float32 scalar that `backward` goes through.
///
/// - `student`, `teacher`: logits `[.., vocab]` of one shape, each float32, float16 or bfloat16, on the CPU. They are read
///   where they lie if rows are contiguous and at most two strides lead to them, and copied otherwise.
/// - `labels`: their shape without the last dimension, of any integer dtype.
///
/// If the student requires a gradient, or depends on what does, the gradient is computed together with the loss, which
/// then holds it: float32, as large as the student's logits. `backward` multiplies it by the gradient that arrives.
/// Nothing flows back to the teacher.
///
/// # Errors
/// If tensors are not on the CPU, dtypes or shapes are others than these, or a label is out of range.
pub fn loss(
    objective: &Objective,
    student: &Tensor,
    teacher: &Tensor,
    labels: &Tensor,
) -> Result<Tensor> {
    let shape = student.size();
    let Some((&vocab, of_tokens)) = shape.split_last() else {
        return Err("the student's logits are a scalar, but must be [.., vocab]".into());
    };
    for (what, tensor, expected) in
        [("teacher's logits", teacher, &shape[..]), ("labels", labels, of_tokens)]
    {
        if tensor.size() != expected {
            let actual = tensor.size();
            return Err(format!(
                "the {what} are {actual:?}, but for student's logits {shape:?} must be {expected:?}"
            )
            .into());
        }
    }
    if !matches!(labels.kind(), Kind::Int64 | Kind::Int | Kind::Int16 | Kind::Int8 | Kind::Uint8) {
        return Err(format!("the labels are {:?}, but must be integers", labels.kind()).into());
    }
    // These own the copies, where there are any, until the call is over.
    let (student_rows, teacher_rows) =
        (Rows::new("student's logits", student)?, Rows::new("teacher's logits", teacher)?);
    on_cpu("labels", labels)?;
    let labels = labels.f_to_kind(Kind::Int64)?.f_contiguous()?;
    let gradient = match student.requires_grad() {
        true => Some(Tensor::f_zeros(&shape, (Kind::Float, Device::Cpu))?),
        false => None,
    };

    let mut value = 0_f32;
    let call = RawCall {
        tokens: of_tokens.iter().product::<i64>() as usize,
        vocab: vocab as usize,
        teacher: teacher_rows.raw,
        student: student_rows.raw,
        gradient: gradient.as_ref().map(|gradient| RawLogits {
            address: gradient.data_ptr() as u64,
            dtype: Dtype::F32,
            strides: (vocab as usize).into(),
        }),
        gradient_padding: 0,
        labels: Some(RawLabels::I64(labels.data_ptr() as u64)),
        sequences: None,
        margins: None,
        hard: None,
        token_weights: None,
        temperatures: None,
        upstream: None,
    };
    let output = RawOutput { loss: Some(&raw mut value as u64), ..RawOutput::default() };
    // SAFETY: the addresses are of tensors of these shapes, strides and dtypes on the CPU, which live as long as their
    // owners above, and nobody else has the gradient. Initialised are the gradient by its zeros, and the others by whoever
    // made them.
    unsafe { raw::run(None, objective, &call, &output)? };

    let Some(gradient) = gradient else { return Ok(Tensor::from(value)) };
    let flat = student.f_to_kind(Kind::Float)?.f_reshape([-1])?;
    let loss = flat.f_dot(&gradient.f_reshape([-1])?)?;
    // Its memory without its history. Where logits are -inf, the product was NaN.
    let _ = loss.f_data()?.f_fill_(f64::from(value))?;
    Ok(loss)
}

fn on_cpu(what: &str, tensor: &Tensor) -> Result<()> {
    match tensor.device() {
        Device::Cpu => Ok(()),
        other => Err(format!("the {what} are on {other:?}, but must be on the CPU").into()),
    }
}

/// Logits `[.., vocab]` as rows with one stride or two.
struct Rows {
    raw: RawLogits,
    /// The owner of the memory at that address.
    _tensor: Tensor,
}

impl Rows {
    fn new(what: &str, tensor: &Tensor) -> Result<Self> {
        on_cpu(what, tensor)?;
        let dtype = match tensor.kind() {
            Kind::Float => Dtype::F32,
            Kind::Half => Dtype::F16,
            Kind::BFloat16 => Dtype::Bf16,
            other => {
                return Err(format!(
                    "the {what} are {other:?}, but must be Float, Half or BFloat16"
                )
                .into());
            }
        };
        let sizes =
            |sizes: Vec<i64>| sizes.into_iter().map(|size| size as usize).collect::<Vec<_>>();
        let shape = sizes(tensor.size());
        let (tensor, strides) = match Strides::of_tensor(&shape, &sizes(tensor.stride())) {
            Some(strides) => (tensor.shallow_clone(), strides),
            None => (tensor.f_contiguous()?, shape[shape.len() - 1].into()),
        };
        let address = tensor.data_ptr() as u64;
        Ok(Self { raw: RawLogits { address, dtype, strides }, _tensor: tensor })
    }
}
