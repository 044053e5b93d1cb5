//! Models whose vocabularies are padded, each by columns of its own: they count for nothing.

use atkd::call::{RawCall, RawLabels, RawLogits, RawOutput};
use atkd::{Batch, Dtype, Error, Logits, LogitsMut, Objective, Output, cpu, reference};

const TOKENS: usize = 6;
const VOCAB: usize = 151;
const TEACHER_COLUMNS: usize = 152;
const STUDENT_COLUMNS: usize = 160;
const LABELS: [i64; TOKENS] = [3, 150, -100, 0, 77, 9];

/// Rows whose padding would have almost all of the probability.
fn padded(columns: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..TOKENS * columns)
        .map(|i| if i % columns < VOCAB { 4.0 * random.f32() } else { 50.0 })
        .collect()
}

fn without_padding(rows: &[f32], columns: usize) -> Vec<f32> {
    rows.chunks(columns).flat_map(|row| &row[..VOCAB]).copied().collect()
}

fn view(rows: &[f32], columns: usize) -> Logits<'_> {
    Logits::new(rows, TOKENS, columns).unwrap().with_vocab(VOCAB).unwrap()
}

fn view_mut(rows: &mut [f32], columns: usize) -> LogitsMut<'_> {
    LogitsMut::new(rows, TOKENS, columns).unwrap().with_vocab(VOCAB).unwrap()
}

/// Loss and gradient of logits that have no padding.
fn expected(objective: &Objective) -> (Output, Vec<f32>) {
    let teacher = without_padding(&padded(TEACHER_COLUMNS, 1), TEACHER_COLUMNS);
    let student = without_padding(&padded(STUDENT_COLUMNS, 2), STUDENT_COLUMNS);
    let batch = Batch::new(Logits::new(&teacher, TOKENS, VOCAB).unwrap(), &LABELS).unwrap();
    let mut gradient = vec![9.0; TOKENS * VOCAB];
    let to = LogitsMut::new(&mut gradient, TOKENS, VOCAB).unwrap();
    let student = Logits::new(&student, TOKENS, VOCAB).unwrap();
    (cpu::forward_backward(objective, &batch, student, to).unwrap(), gradient)
}

/// That a gradient `[TOKENS, STUDENT_COLUMNS]` is the one expected, and 0 in the padding.
#[track_caller]
fn check(gradient: &[f32], expected: &[f32]) {
    for (row, expected) in gradient.chunks(STUDENT_COLUMNS).zip(expected.chunks(VOCAB)) {
        assert_eq!(&row[..VOCAB], expected);
        assert_eq!(row[VOCAB..], [0.0; STUDENT_COLUMNS - VOCAB]);
    }
}

#[test]
fn padding_counts_for_nothing() {
    let (teacher, student) = (padded(TEACHER_COLUMNS, 1), padded(STUDENT_COLUMNS, 2));
    let batch = Batch::new(view(&teacher, TEACHER_COLUMNS), &LABELS).unwrap();
    for objective in [Objective::default(), Objective::plain().with_ce_weight(0.5).unwrap()] {
        let (output, expected) = expected(&objective);

        let mut gradient = vec![9.0; TOKENS * STUDENT_COLUMNS];
        let to = view_mut(&mut gradient, STUDENT_COLUMNS);
        let logits = view(&student, STUDENT_COLUMNS);
        assert_eq!(cpu::forward_backward(&objective, &batch, logits, to).unwrap(), output);
        check(&gradient, &expected);
        let mut in_place = student.clone();
        let to = view_mut(&mut in_place, STUDENT_COLUMNS);
        cpu::forward_backward_in_place(&objective, &batch, to).unwrap();
        check(&in_place, &expected);

        let (exact, _) = reference::forward_backward(&objective, &batch, logits).unwrap();
        assert!((exact.loss - output.loss).abs() < 1e-6, "{} {}", exact.loss, output.loss);
    }
}

#[test]
fn by_address() {
    let (teacher, mut student) = (padded(TEACHER_COLUMNS, 1), padded(STUDENT_COLUMNS, 2));
    let (output, expected) = expected(&Objective::default());
    let mut gradient = vec![9.0_f32; TOKENS * STUDENT_COLUMNS];
    let at = |address, columns: usize| RawLogits {
        address: address as u64,
        dtype: Dtype::F32,
        strides: columns.into(),
    };
    let place = at(student.as_mut_ptr(), STUDENT_COLUMNS);
    let call = RawCall {
        tokens: TOKENS,
        vocab: VOCAB,
        teacher: at(teacher.as_ptr().cast_mut(), TEACHER_COLUMNS),
        student: place,
        gradient: Some(at(gradient.as_mut_ptr(), STUDENT_COLUMNS)),
        gradient_padding: STUDENT_COLUMNS - VOCAB,
        labels: Some(RawLabels::I64(LABELS.as_ptr() as u64)),
        sequences: None,
        margins: None,
        hard: None,
        token_weights: None,
        temperatures: None,
        upstream: None,
    };
    let mut loss = 0.0_f32;
    let to = RawOutput { loss: Some(&raw mut loss as u64), ..RawOutput::default() };
    let in_place = RawCall { gradient: Some(place), ..call };
    let run = |call: &RawCall| {
        // SAFETY: the addresses are of arrays of the shapes given.
        unsafe { cpu::raw::run(None, &Objective::default(), call, &to) }
    };
    run(&call).unwrap();
    check(&gradient, &expected);
    run(&in_place).unwrap();
    check(&student, &expected);
    assert_eq!(loss, output.loss as f32);
    // More padding than there is between the rows.
    let error = run(&RawCall { gradient_padding: STUDENT_COLUMNS - VOCAB + 1, ..call });
    assert!(matches!(error, Err(Error::Shape { vocab: 161, .. })), "{error:?}");
}

#[test]
fn impossible_vocabularies() {
    let logits = padded(TEACHER_COLUMNS, 1);
    let logits = Logits::new(&logits, TOKENS, TEACHER_COLUMNS).unwrap();
    for vocab in [0, TEACHER_COLUMNS + 1] {
        let error = logits.with_vocab(vocab).unwrap_err();
        assert_eq!(error, Error::Vocab { vocab, columns: TEACHER_COLUMNS });
    }
    assert_eq!(logits.with_vocab(TEACHER_COLUMNS).unwrap().vocab(), TEACHER_COLUMNS);
}
