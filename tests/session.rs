//! A call in stages comes to the bits of one call on the whole batch, whatever the ranges.

use atkd::cpu::{self, Session};
use atkd::{Batch, Error, Logits, LogitsMut, Objective, Output, Reduction, Target, TokenTerms};
use half::bf16;

const TOKENS: usize = 97;
const VOCAB: usize = 300;

struct Data {
    teacher: Vec<bf16>,
    student: Vec<bf16>,
    labels: Vec<i64>,
}

impl Data {
    /// Margins of all sizes, an ignored token in nine.
    fn new(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let labels: Vec<i64> = (0..TOKENS)
            .map(|token| if token % 9 == 4 { -100 } else { random.i64(0..VOCAB as i64) })
            .collect();
        let mut logits = || -> Vec<bf16> {
            (0..TOKENS * VOCAB).map(|_| bf16::from_f32(6.0 * random.f32() - 3.0)).collect()
        };
        let (mut teacher, student) = (logits(), logits());
        for (token, &label) in labels.iter().enumerate().filter(|(_, label)| **label >= 0) {
            teacher[token * VOCAB + label as usize] = bf16::from_f32((token % 23) as f32);
        }
        Self { teacher, student, labels }
    }

    fn teacher(&self, first: usize, count: usize) -> Logits<'_> {
        let rows = &self.teacher[first * VOCAB..(first + count) * VOCAB];
        Logits::new(rows, count, VOCAB).unwrap()
    }

    fn student(&self, first: usize, count: usize) -> Logits<'_> {
        let rows = &self.student[first * VOCAB..(first + count) * VOCAB];
        Logits::new(rows, count, VOCAB).unwrap()
    }

    /// The logits of some tokens, one after the other.
    fn gathered(logits: &[bf16], tokens: &[usize]) -> Vec<bf16> {
        tokens.iter().flat_map(|token| &logits[token * VOCAB..][..VOCAB]).copied().collect()
    }

    fn whole(&self, objective: &Objective, with: With) -> (Output, Vec<u32>) {
        let teacher = self.teacher(0, TOKENS);
        let batch = match objective.target() {
            Target::Label => Batch::new(teacher, &self.labels).unwrap(),
            Target::Teacher => Batch::unlabelled(teacher),
        };
        let batch = match with {
            With::Nothing => batch,
            With::Sequences(offsets) => batch.with_sequences(offsets).unwrap(),
            With::Margins(margins) => batch.with_margins(margins).unwrap(),
            With::Hard(hard) => batch.with_hard(hard).unwrap(),
        };
        let mut gradient = vec![f32::NAN; TOKENS * VOCAB];
        let to = LogitsMut::new(&mut gradient, TOKENS, VOCAB).unwrap();
        let student = self.student(0, TOKENS);
        let output = cpu::forward_backward(objective, &batch, student, to).unwrap();
        (output, gradient.iter().map(|g| g.to_bits()).collect())
    }

    fn begin<'a>(&'a self, objective: &Objective, with: With<'a>) -> Session<'a> {
        let session = match objective.target() {
            Target::Label => Session::begin(objective, &self.labels, VOCAB).unwrap(),
            Target::Teacher => Session::begin_unlabelled(objective, TOKENS, VOCAB).unwrap(),
        };
        match with {
            With::Nothing => session,
            With::Sequences(offsets) => session.with_sequences(offsets).unwrap(),
            With::Margins(margins) => session.with_margins(margins).unwrap(),
            With::Hard(hard) => session.with_hard(hard).unwrap(),
        }
    }

    /// The same in ranges, and how many tokens were repaired.
    fn staged(
        &self,
        objective: &Objective,
        with: With,
        lengths: &[usize],
        margins_first: bool,
    ) -> (Output, Vec<u32>, usize) {
        let mut ranges = Vec::new();
        let mut first = 0;
        for length in lengths.iter().cycle() {
            let count = (*length).min(TOKENS - first);
            ranges.push((first, count));
            first += count;
            if first == TOKENS {
                break;
            }
        }
        // No order is asked for.
        fastrand::Rng::with_seed(7).shuffle(&mut ranges);
        let mut session = self.begin(objective, with);
        if margins_first {
            for &(first, count) in ranges.iter().rev() {
                session.margins(first, self.teacher(first, count)).unwrap();
            }
            assert!(session.select().unwrap().is_empty());
        }
        let mut gradient = vec![f32::NAN; TOKENS * VOCAB];
        for &(first, count) in &ranges {
            let rows = &mut gradient[first * VOCAB..(first + count) * VOCAB];
            let rows = LogitsMut::new(rows, count, VOCAB).unwrap();
            let (teacher, student) = (self.teacher(first, count), self.student(first, count));
            session.rows(first, teacher, student, Some(rows)).unwrap();
        }
        let mut mispredicted = session.select().unwrap().to_vec();
        let repaired = mispredicted.len();
        // In two parts, the later tokens first.
        mispredicted.reverse();
        for tokens in mispredicted.chunks(repaired.div_ceil(2).max(1)) {
            let teacher = Self::gathered(&self.teacher, tokens);
            let student = Self::gathered(&self.student, tokens);
            let mut right = vec![f32::NAN; tokens.len() * VOCAB];
            let logits = |logits| Logits::new(logits, tokens.len(), VOCAB).unwrap();
            let to = LogitsMut::new(&mut right, tokens.len(), VOCAB).unwrap();
            session.repair(tokens, logits(&teacher), logits(&student), to).unwrap();
            for (row, token) in right.chunks(VOCAB).zip(tokens) {
                gradient[token * VOCAB..][..VOCAB].copy_from_slice(row);
            }
        }
        let output = session.finish().unwrap();
        (output, gradient.iter().map(|g| g.to_bits()).collect(), repaired)
    }
}

#[derive(Clone, Copy)]
enum With<'a> {
    Nothing,
    Sequences(&'a [usize]),
    Margins(&'a [f32]),
    Hard(&'a [bool]),
}

fn bits(token: &TokenTerms) -> ([u64; 5], bool, bool) {
    let TokenTerms { margin, uncertainty, tkd, dkd, loss, valid, hard } = *token;
    ([margin, uncertainty, tkd, dkd, loss].map(f64::to_bits), valid, hard)
}

#[track_caller]
fn assert_same(found: &(Output, Vec<u32>, usize), expected: &(Output, Vec<u32>)) {
    assert_eq!(found.0.loss.to_bits(), expected.0.loss.to_bits());
    assert!(found.0.tokens.iter().map(bits).eq(expected.0.tokens.iter().map(bits)));
    assert!(found.1 == expected.1);
}

#[test]
fn ranges_of_any_length_come_to_the_bits_of_one_call() {
    let data = Data::new(1);
    let margins: Vec<f32> = (0..TOKENS).map(|token| (token * 37 % 11) as f32).collect();
    let hard: Vec<bool> = (0..TOKENS).map(|token| token % 3 == 0).collect();
    let offsets = [0, 0, 30, 31, TOKENS];
    let plain = Objective::default();
    let summed = plain.with_reduction(Reduction::Sum).unwrap().with_temperature(2.5).unwrap();
    let objectives = [
        plain,
        summed.with_ce_weight(0.4).unwrap(),
        plain.with_reduction(Reduction::Denominator(13.0)).unwrap().with_hard_ratio(0.1).unwrap(),
        plain.with_target(Target::Teacher),
        Objective::kl(),
    ];
    let mut repaired = 0;
    for objective in objectives {
        for with in
            [With::Nothing, With::Sequences(&offsets), With::Margins(&margins), With::Hard(&hard)]
        {
            let whole = data.whole(&objective, with);
            for lengths in [&[TOKENS][..], &[1], &[0, 40, 3, 0, 11], &[64]] {
                let staged = data.staged(&objective, with, lengths, false);
                assert_same(&staged, &whole);
                repaired += staged.2;
                let by_margins = matches!(with, With::Nothing | With::Sequences(_));
                if by_margins {
                    let staged = data.staged(&objective, with, lengths, true);
                    assert_same(&staged, &whole);
                    assert_eq!(staged.2, 0);
                }
            }
        }
    }
    assert!(repaired > 0, "no prediction was ever wrong, so that no repair was tested");
}

/// As gradients in place, whose logits are gone when a prediction turns out wrong: the caller brings them again.
#[test]
fn gradients_in_place_are_repaired_from_logits_brought_again() {
    let data = Data::new(2);
    let objective = Objective::default();
    let (expected, _) = data.whole(&objective, With::Nothing);
    let mut whole = data.student.clone();
    let batch = Batch::new(data.teacher(0, TOKENS), &data.labels).unwrap();
    let to = LogitsMut::new(&mut whole, TOKENS, VOCAB).unwrap();
    cpu::forward_backward_in_place(&objective, &batch, to).unwrap();

    let mut staged = data.student.clone();
    let mut session = data.begin(&objective, With::Nothing);
    for first in [50, 0] {
        let count = if first == 0 { 50 } else { TOKENS - 50 };
        let rows = &mut staged[first * VOCAB..(first + count) * VOCAB];
        let rows = LogitsMut::new(rows, count, VOCAB).unwrap();
        session.rows_in_place(first, data.teacher(first, count), rows).unwrap();
    }
    let mispredicted = session.select().unwrap().to_vec();
    assert!(!mispredicted.is_empty());
    for token in mispredicted {
        let to = LogitsMut::new(&mut staged[token * VOCAB..][..VOCAB], 1, VOCAB).unwrap();
        session.repair(&[token], data.teacher(token, 1), data.student(token, 1), to).unwrap();
    }
    assert_eq!(session.finish().unwrap().loss.to_bits(), expected.loss.to_bits());
    assert!(staged == whole);
}

#[test]
fn a_batch_without_a_valid_token_has_no_loss() {
    let data = Data::new(3);
    let labels = [-100_i64; TOKENS];
    let mut session = Session::begin(&Objective::default(), &labels, VOCAB).unwrap();
    let mut gradient = vec![f32::NAN; TOKENS * VOCAB];
    let to = LogitsMut::new(&mut gradient, TOKENS, VOCAB).unwrap();
    session.rows(0, data.teacher(0, TOKENS), data.student(0, TOKENS), Some(to)).unwrap();
    assert!(session.select().unwrap().is_empty());
    let output = session.finish().unwrap();
    assert_eq!(output.loss, 0.0);
    assert!(output.tokens.iter().all(|token| !token.valid));
    assert!(gradient.iter().all(|&g| g == 0.0));

    let empty = Session::begin(&Objective::default(), &[0_i64; 0], VOCAB).unwrap();
    assert_eq!(empty.finish().unwrap().loss, 0.0);
}

#[test]
fn stages_out_of_order_are_errors() {
    let data = Data::new(4);
    let objective = Objective::default();
    let begin = || data.begin(&objective, With::Nothing);
    let stage = |token, problem| Error::Stage { token, problem };
    let rows = |session: &mut Session, first, count| {
        session.rows(first, data.teacher(first, count), data.student(first, count), None)
    };

    let mut session = begin();
    rows(&mut session, 10, 5).unwrap();
    assert_eq!(rows(&mut session, 14, 2), Err(stage(14, "was handed over before")));
    rows(&mut session, 15, 1).unwrap();
    assert_eq!(session.select().map(drop), Err(stage(0, "has no margin yet")));
    assert_eq!(session.finish().map(drop), Err(stage(0, "has no margin yet")));

    let mut session = begin();
    session.margins(0, data.teacher(0, TOKENS)).unwrap();
    session.select().unwrap();
    rows(&mut session, 1, TOKENS - 1).unwrap();
    assert_eq!(session.finish().map(drop), Err(stage(0, "was never handed over")));

    let mut session = begin();
    let beyond = Error::TokenRange { first: TOKENS - 1, count: 2, tokens: TOKENS };
    let two = session.rows(TOKENS - 1, data.teacher(0, 2), data.student(0, 2), None);
    assert_eq!(two, Err(beyond.clone()));
    assert_eq!(
        beyond.to_string(),
        format!("2 tokens from token 96 on reach beyond the call's {TOKENS}")
    );
    let uneven = session.rows(0, data.teacher(0, 2), data.student(0, 3), None);
    assert!(matches!(uneven, Err(Error::ShapeMismatch { .. })));

    // A token that needs none, one twice, one that is left.
    let mut gradient = vec![0.0; TOKENS * VOCAB];
    let to = LogitsMut::new(&mut gradient, TOKENS, VOCAB).unwrap();
    session.rows(0, data.teacher(0, TOKENS), data.student(0, TOKENS), Some(to)).unwrap();
    let mispredicted = session.select().unwrap().to_vec();
    let right = (0..TOKENS).find(|token| !mispredicted.contains(token)).unwrap();
    let (wrong, last) = (mispredicted[0], mispredicted[mispredicted.len() - 1]);
    for tokens in [[right, wrong], [wrong, wrong], [wrong, TOKENS]] {
        let mut gradient = vec![7.0_f32; 2 * VOCAB];
        let to = LogitsMut::new(&mut gradient, 2, VOCAB).unwrap();
        let repair = session.repair(&tokens, data.teacher(0, 2), data.student(0, 2), to);
        assert!(matches!(repair, Err(Error::Stage { problem: "needs no repair", .. })));
        assert!(gradient.iter().all(|&g| g == 7.0));
    }
    assert!(mispredicted.len() > 1);
    for &token in &mispredicted[..mispredicted.len() - 1] {
        let to = LogitsMut::new(&mut gradient[token * VOCAB..][..VOCAB], 1, VOCAB).unwrap();
        session.repair(&[token], data.teacher(token, 1), data.student(token, 1), to).unwrap();
    }
    assert_eq!(session.finish().map(drop), Err(stage(last, "waits for its repair")));
}
