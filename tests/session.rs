//! A call in stages on the CPU.

#[macro_use]
#[path = "stages/on_host_logits.rs"]
mod on_host_logits;
mod stages;

use atkd::cpu;
use atkd::{Batch, Objective, Output, Result};
use half::bf16;
use stages::{Backend, Session, VOCAB, logits, logits_mut};

struct Cpu;

impl Backend for Cpu {
    fn whole(
        &self,
        objective: &Objective,
        batch: &Batch,
        student: &[bf16],
        gradient: &mut [bf16],
    ) -> Result<Output> {
        cpu::forward_backward(objective, batch, logits(student), logits_mut(gradient))
    }

    fn begin<'a>(
        &'a self,
        objective: &Objective,
        batch: &Batch<'a>,
    ) -> Result<Box<dyn Session + 'a>> {
        let mut session = match batch.labels() {
            Some(labels) => cpu::Session::begin(objective, labels, VOCAB)?,
            None => cpu::Session::begin_unlabelled(objective, batch.teacher().tokens(), VOCAB)?,
        };
        if let Some(offsets) = batch.sequences() {
            session = session.with_sequences(offsets)?;
        }
        if let Some(margins) = batch.margins() {
            session = session.with_margins(margins)?;
        }
        if let Some(hard) = batch.hard() {
            session = session.with_hard(hard)?;
        }
        if let Some(weights) = batch.token_weights() {
            session = session.with_token_weights(weights)?;
        }
        if let Some(temperatures) = batch.temperatures() {
            session = session.with_temperatures(temperatures)?;
        }
        Ok(Box::new(session))
    }
}

on_host_logits!(cpu::Session<'_>);

#[test]
fn ranges_of_any_length_come_to_the_bits_of_one_call() {
    stages::ranges_of_any_length_come_to_the_bits_of_one_call(&Cpu);
}

#[test]
fn margins_of_some_tokens() {
    stages::margins_of_some_tokens(&Cpu);
}

#[test]
fn ranges_without_gradients() {
    stages::ranges_without_gradients(&Cpu);
}

#[test]
fn a_batch_without_a_valid_token_has_no_loss() {
    stages::a_batch_without_a_valid_token_has_no_loss(&Cpu);
}

#[test]
fn stages_out_of_order_are_errors() {
    stages::stages_out_of_order_are_errors(&Cpu);
}

#[test]
fn gradients_wait_for_the_sizes_of_groups() {
    stages::gradients_wait_for_the_sizes_of_groups(&Cpu);
}

/// A setting that comes after a stage would hold for some of the tokens.
#[test]
fn settings_come_before_stages() {
    let teacher = [2.0_f32, 1.0, 0.0, 0.0, 3.0, 1.0];
    let begun = |by_margins: bool| {
        let mut session = cpu::Session::begin(&Objective::default(), &[0_i64, 1], 3).unwrap();
        let row = atkd::Logits::new(&teacher[3..], 1, 3).unwrap();
        match by_margins {
            true => session.margins(1, row).unwrap(),
            false => session.rows(1, row, row, None).unwrap(),
        }
        session
    };
    for by_margins in [false, true] {
        let late = [
            begun(by_margins).with_sequences(vec![0, 2]).err(),
            begun(by_margins).with_margins(&[0.0; 2]).err(),
            begun(by_margins).with_teacher_log_probs(&[-1.0; 2]).err(),
            begun(by_margins).with_hard(&[true; 2]).err(),
            begun(by_margins).with_token_weights(&[1.0; 2]).err(),
            begun(by_margins).with_temperatures(&[1.0; 2]).err(),
        ];
        for error in late {
            assert!(matches!(error, Some(atkd::Error::Stage { token: 1, .. })), "{error:?}");
        }
    }
    let session = cpu::Session::begin(&Objective::default(), &[0_i64, 1], 3).unwrap();
    let mut session = session.with_margins(&[0.0, 1.0]).unwrap();
    session.select().unwrap();
    let late = session.with_sequences(vec![0, 2]).err();
    assert!(matches!(late, Some(atkd::Error::Stage { .. })), "{late:?}");
}
