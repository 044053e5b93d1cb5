pub mod batch;
#[cfg(feature = "candle")]
pub mod candle;
pub mod cpu;
mod error;
mod logits;
mod objective;
mod output;
pub mod reference;
mod row;

pub use batch::{Batch, Labels};
pub use error::{Error, Result};
pub use logits::{Dtype, Elements, ElementsMut, Logits, LogitsMut};
pub use objective::{Coefficient, Coefficients, Objective, Reduction, Target};
pub use output::{Output, Summary, TokenTerms};
