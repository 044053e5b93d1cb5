//! The ATKD knowledge-distillation loss (Zhong et al., *Revisiting Knowledge Distillation for
//! Autoregressive Language Models*, ACL 2024) and its gradient, fused and exact to rounding.
//!
//! A large teacher's and a small student's logits go in; the loss, the terms of every token and the
//! gradient with respect to the student's logits come out. Nothing of the size of the logits is
//! allocated on the way.
//!
//! ```
//! use atkd::{Batch, Logits, LogitsMut, Objective, cpu};
//!
//! let (tokens, vocab) = (2, 3);
//! let teacher = [2.0_f32, 1.0, 0.0, 0.5, 0.5, 3.0];
//! let student = [1.0_f32, 1.0, 1.0, 0.0, 1.0, 0.0];
//! let mut gradient = [0.0_f32; 6];
//! let batch = Batch::new(Logits::new(&teacher[..], tokens, vocab)?, &[0_i64, 1])?;
//! let output = cpu::forward_backward(
//!     &Objective::default(),
//!     &batch,
//!     Logits::new(&student[..], tokens, vocab)?,
//!     LogitsMut::new(&mut gradient[..], tokens, vocab)?,
//! )?;
//! assert!(output.loss > 0.0 && output.tokens[1].hard && !output.tokens[0].hard);
//! # Ok::<(), atkd::Error>(())
//! ```
//!
//! # The loss
//!
//! For each token, p is the teacher's and q the student's softmax over the vocabulary, g the target:
//! the token's label, or what the teacher thinks likeliest. The KL divergence splits in two, with the
//! teacher's uncertainty between them:
//!
//! ```text
//! UNC = 1 - p_g
//! TKD = p_g log(p_g / q_g) + (1 - p_g) log((1 - p_g) / (1 - q_g))
//! DKD = sum_{j != g} phat_j log(phat_j / qhat_j)      phat_j = p_j / (1 - p_g), qhat_j = q_j / (1 - q_g)
//! KL(p || q) = TKD + UNC * DKD
//! ```
//!
//! The half of the tokens with the largest UNC are *hard* and learn `(1 - lambda) (TKD + DKD)`; the
//! others are *easy* and learn `lambda DKD` alone, lambda = 0.2. (The paper writes the terms with a
//! leading minus; what is returned here is the divergence that is minimised.) An [`Objective`] says all
//! that and more: plain KL, TKD or DKD alone, any other coefficients, temperature, selection within
//! sequences, reduction, cross entropy mixed in.
//!
//! *The tokens* are those of one call. Where a batch is cut into several calls, micro-batches or the ranks of a group,
//! each selects within its part, and the gradients of the parts do not add up to the whole batch's: between two small
//! random models they were 16 to 25% off for 2 to 16 micro-batches, and 7 to 26% for two ranks. One selection over
//! all of them is [`select_hard`] over the margins of every part ([`cpu::teacher_margins`]), of which
//! [`Batch::with_hard`] gives each call its share:
//!
//! ```
//! use atkd::{Batch, Logits, Objective, Reduction, Result, cpu, select_hard};
//!
//! fn batch<'a>((teacher, labels): (&'a [f32], &'a [i64])) -> Result<Batch<'a>> {
//!     Batch::new(Logits::new(teacher, labels.len(), 3)?, labels)
//! }
//!
//! let teacher = [2.0, 1.0, 0.0, 0.5, 0.5, 3.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0];
//! let parts = [(&teacher[..3], &[0_i64][..]), (&teacher[3..], &[1, 2, 2][..])];
//! let objective = Objective::default().with_reduction(Reduction::Denominator(4.0))?;
//! let mut margins = Vec::new();
//! for part in parts {
//!     margins.extend(cpu::teacher_margins(&objective, &batch(part)?)?);
//! }
//! // No token is ignored, else `valid` tells which are not.
//! let hard = select_hard(&margins, None, objective.hard_ratio(), None)?;
//! let (mut start, mut loss) = (0, 0.0);
//! for part in parts {
//!     let (tokens, end) = (part.1.len(), start + part.1.len());
//!     let student = Logits::new(&[0.0_f32; 9][..3 * tokens], tokens, 3)?;
//!     loss += cpu::forward(&objective, &batch(part)?.with_hard(&hard[start..end])?, student)?.loss;
//!     start = end;
//! }
//! assert_eq!(hard, [false, true, true, false]);
//! # assert!(loss > 0.0);
//! # Ok::<(), atkd::Error>(())
//! ```
//!
//! # Which module
//!
//! - [`cpu`] computes: fused, vectorised, on all cores.
//! - [`cuda`] computes on NVIDIA GPUs, from and to device memory (feature `cuda`, on by default; builds and
//!   loads without CUDA too). The kernels are in a build only if an nvcc compiled them.
//! - [`reference`](mod@reference) is the same in float64 straight from the definitions, for checking.
//! - [`SparseTeacher`] stands for the teacher's logits where some log-probabilities per token are all that is known: of a
//!   teacher on disk or behind a server. [`cpu`] and [`reference`](mod@reference) compute with it.
//! - [`call`] is calls by address, for other languages and frameworks; [`cpu::raw`] runs them on the host.
//! - [`shards`] is a call over ranks of which each has some columns of the logits.
//! - [`head`], with the feature of that name, computes the loss from hidden states and the weights of both models' last
//!   layers, a chunk of tokens at a time, so that the logits of all tokens never exist.
//! - [`teacher_cache`], with the feature `teacher-cache`, keeps the teacher's most probable tokens on disk, so that the
//!   teacher need not be there when the student learns.
//! - [`candle`], with the feature of that name, is a differentiable operation for training loops; with
//!   `candle-cuda` on CUDA tensors too.
//! - [`simt`], with the feature of that name, runs the CUDA kernels on the CPU, as a test.
//! - [`battery`], with the feature of that name, holds the tests that every implementation must pass. With the same
//!   feature, [`unfused`] is the baseline of the benchmarks.
#![warn(missing_docs)]
// Without its feature a module has no page to link to.
#![cfg_attr(
    not(all(
        feature = "candle",
        feature = "cuda",
        feature = "head",
        feature = "simt",
        feature = "teacher-cache"
    )),
    allow(rustdoc::broken_intra_doc_links)
)]

mod batch;
#[cfg(feature = "battery")]
pub mod battery;
pub mod call;
#[cfg(feature = "candle")]
pub mod candle;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(feature = "cuda", feature = "simt"))]
mod device;
mod error;
#[cfg(feature = "head")]
pub mod head;
mod logits;
mod objective;
mod output;
mod params;
#[cfg(any(feature = "cuda", feature = "simt"))]
pub mod plan;
pub mod reference;
pub mod report;
mod selection;
pub mod shards;
#[cfg(feature = "simt")]
pub mod simt;
mod sparse;
mod strides;
#[cfg(feature = "teacher-cache")]
pub mod teacher_cache;
#[cfg(feature = "battery")]
pub mod unfused;

pub use batch::{Batch, Labels};
pub use error::{Error, Result};
pub use logits::{Dtype, Elements, ElementsMut, Logits, LogitsMut};
pub use objective::{
    Coefficient, Coefficients, Divergence, Objective, Reduction, ReductionScales, SelectionRule,
    Target,
};
pub use output::{Output, Summary, TokenTerms};
pub use selection::select_hard;
pub use sparse::{SparseTeacher, Tail, Teacher, TeacherRow};
pub use strides::Strides;
