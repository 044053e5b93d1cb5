//! Shards of the vocabulary: each rank has some columns of the logits, and all agree on the loss.
//!
//! A rank sums up its part of each row into a [`RowState`], and the ranks exchange these; every one merges all of them in the
//! same order, and so has the same bits: the same margins, hard tokens and loss, and the gradient of its own columns. How
//! they exchange is the caller's: NCCL, MPI, shared memory. The stages keep nothing, so that each is given what was
//! exchanged before.
//!
//! ```text
//! states      local logits            -> [N] RowState      exchange to [R, N]
//! margins     states                  -> [N] the teacher's margins, for select_hard
//! terms       local logits, states    -> [N] SweepTerms    exchange to [R, N]; divergences of two sweeps only
//! gradient    local logits, states, terms, hard tokens -> the gradient of the local columns
//! finish      states, terms, hard tokens -> loss and every token's terms
//! ```
//!
//! Labels are tokens of the whole vocabulary, and the target may be in any shard. A shard may be empty. By
//! [`Target::Teacher`](crate::Target::Teacher) each rank leaves out its own arg max, of which the largest is the target,
//! the one of the lowest column among equals.

pub use crate::params::{atkd_row_state as RowState, atkd_sweep_terms as SweepTerms};
