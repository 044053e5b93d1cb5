//! A call in stages has the bits of one call on the whole batch on every backend, whatever the ranges.

use std::ops::Range;

use atkd::battery::Aligned;
use atkd::{
    Batch, Error, Logits, LogitsMut, Objective, Output, Reduction, Result, SelectionRule, Target,
    TokenTerms,
};
use half::bf16;

pub const TOKENS: usize = 61;
/// Rows of whole lines of the L2 cache, so that every row starts alike wherever its logits lie.
pub const VOCAB: usize = 320;

/// A backend that has calls in one and calls in stages.
pub trait Backend {
    /// Loss and gradient of one call.
    fn whole(
        &self,
        objective: &Objective,
        batch: &Batch,
        student: &[bf16],
        gradient: &mut [bf16],
    ) -> Result<Output>;

    /// Begins a call in stages about a batch, whose logits are not read.
    fn begin<'a>(&'a self, objective: &Objective, batch: &Batch<'a>) -> Result<Box<Stages<'a>>>;
}

type Stages<'a> = dyn Session + 'a;

/// The stages of a call, on rows that lie side by side.
pub trait Session {
    fn margins(&mut self, first: usize, teacher: &[bf16]) -> Result<()>;
    fn rows(
        &mut self,
        first: usize,
        teacher: &[bf16],
        student: &[bf16],
        gradient: Option<&mut [bf16]>,
    ) -> Result<()>;
    fn rows_in_place(&mut self, first: usize, teacher: &[bf16], student: &mut [bf16])
    -> Result<()>;
    fn select(&mut self) -> Result<Vec<usize>>;
    fn repair(
        &mut self,
        tokens: &[usize],
        teacher: &[bf16],
        student: &[bf16],
        gradient: &mut [bf16],
    ) -> Result<()>;
    fn finish(self: Box<Self>) -> Result<Output>;
}

/// So many rows.
pub fn logits(rows: &[bf16]) -> Logits<'_> {
    Logits::new(rows, rows.len() / VOCAB, VOCAB).unwrap()
}

/// So many rows that may be written.
pub fn logits_mut(rows: &mut [bf16]) -> LogitsMut<'_> {
    let tokens = rows.len() / VOCAB;
    LogitsMut::new(rows, tokens, VOCAB).unwrap()
}

struct Data {
    teacher: Aligned<bf16>,
    student: Aligned<bf16>,
    labels: Vec<i64>,
    token_weights: Vec<f32>,
    temperatures: Vec<f32>,
}

#[derive(Clone, Copy, Debug)]
enum With<'a> {
    Nothing,
    Sequences(&'a [usize]),
    Margins(&'a [f32]),
    Hard(&'a [bool]),
}

/// How a call is cut into stages.
#[derive(Clone, Copy, Debug, Default)]
struct Cut<'a> {
    /// The lengths of the ranges, in turn.
    lengths: &'a [usize],
    /// The selection comes before the rows, by margins of their own stage.
    margins_first: bool,
    in_place: bool,
}

struct Results {
    output: Output,
    gradient: Vec<bf16>,
}

impl Data {
    /// Margins of all sizes, an ignored token in nine.
    fn new(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let labels: Vec<i64> = (0..TOKENS)
            .map(|token| if token % 9 == 4 { -100 } else { random.i64(0..VOCAB as i64) })
            .collect();
        let mut logits = || -> Aligned<bf16> {
            (0..TOKENS * VOCAB).map(|_| bf16::from_f32(6.0 * random.f32() - 3.0)).collect()
        };
        let (mut teacher, student) = (logits(), logits());
        for (token, &label) in labels.iter().enumerate().filter(|(_, label)| **label >= 0) {
            teacher[token * VOCAB + label as usize] = bf16::from_f32((token % 23) as f32);
        }
        let token_weights = (0..TOKENS).map(|token| (token % 5) as f32 - 0.5).collect();
        let temperatures = (0..TOKENS).map(|token| 1.0 + (token % 3) as f32).collect();
        Self { teacher, student, labels, token_weights, temperatures }
    }

    fn batch<'a>(&'a self, objective: &Objective, with: With<'a>) -> Batch<'a> {
        let teacher = logits(&self.teacher);
        // With the teacher's target labels say no more than which tokens are ignored.
        let batch = match (objective.target(), with) {
            (Target::Teacher, With::Nothing | With::Hard(_)) => Batch::unlabelled(teacher),
            _ => Batch::new(teacher, &self.labels).unwrap(),
        };
        match with {
            With::Nothing => batch.with_token_weights(&self.token_weights).unwrap(),
            With::Sequences(offsets) => {
                let batch = batch.with_sequences(offsets).unwrap();
                batch.with_temperatures(&self.temperatures).unwrap()
            }
            With::Margins(margins) => batch.with_margins(margins).unwrap(),
            With::Hard(hard) => batch.with_hard(hard).unwrap(),
        }
    }

    fn whole(&self, backend: &dyn Backend, objective: &Objective, with: With) -> Results {
        let mut gradient = vec![bf16::NAN; TOKENS * VOCAB];
        let batch = self.batch(objective, with);
        let output = backend.whole(objective, &batch, &self.student, &mut gradient).unwrap();
        Results { output, gradient }
    }

    /// The same in ranges, and how many tokens were repaired.
    fn staged(
        &self,
        backend: &dyn Backend,
        objective: &Objective,
        with: With,
        cut: Cut,
    ) -> (Results, usize) {
        let mut ranges = Vec::new();
        let mut first = 0;
        for length in cut.lengths.iter().cycle() {
            let end = (first + length).min(TOKENS);
            ranges.push(first..end);
            first = end;
            if first == TOKENS {
                break;
            }
        }
        // No order is asked for.
        fastrand::Rng::with_seed(7).shuffle(&mut ranges);
        let batch = self.batch(objective, with);
        let mut session = backend.begin(objective, &batch).unwrap();
        let of = |range: &Range<usize>| VOCAB * range.start..VOCAB * range.end;
        if cut.margins_first {
            for range in ranges.iter().rev() {
                session.margins(range.start, &self.teacher[of(range)]).unwrap();
            }
            assert!(session.select().unwrap().is_empty());
        }
        let before = self.student.iter().map(|&z| if cut.in_place { z } else { bf16::NAN });
        let mut gradient: Aligned<bf16> = before.collect();
        for range in &ranges {
            let (rows, to) = (of(range), &mut gradient[of(range)]);
            let (teacher, student) = (&self.teacher[rows.clone()], &self.student[rows]);
            if cut.in_place {
                session.rows_in_place(range.start, teacher, to).unwrap();
            } else {
                session.rows(range.start, teacher, student, Some(to)).unwrap();
            }
        }
        let mut mispredicted = session.select().unwrap();
        assert!(mispredicted.is_sorted());
        let repaired = mispredicted.len();
        // In two parts, the later tokens first.
        mispredicted.reverse();
        for tokens in mispredicted.chunks(repaired.div_ceil(2).max(1)) {
            let gathered = |logits: &[bf16]| -> Aligned<bf16> {
                tokens.iter().flat_map(|token| &logits[token * VOCAB..][..VOCAB]).copied().collect()
            };
            let (teacher, student) = (gathered(&self.teacher), gathered(&self.student));
            let mut right = vec![bf16::NAN; tokens.len() * VOCAB];
            session.repair(tokens, &teacher, &student, &mut right).unwrap();
            for (row, token) in right.chunks(VOCAB).zip(tokens) {
                gradient[token * VOCAB..][..VOCAB].copy_from_slice(row);
            }
        }
        (Results { output: session.finish().unwrap(), gradient: gradient.to_vec() }, repaired)
    }
}

fn bits(token: &TokenTerms) -> ([u64; 4], bool, bool) {
    let TokenTerms { uncertainty, tkd, dkd, loss, valid, hard, .. } = *token;
    ([uncertainty, tkd, dkd, loss].map(f64::to_bits), valid, hard)
}

/// `same_pass`: the margins were found by the same pass over the teacher, so that they are the same bits too.
#[track_caller]
fn assert_same(found: &Results, expected: &Results, same_pass: bool, what: &str) {
    let (found_tokens, expected_tokens) = (&found.output.tokens, &expected.output.tokens);
    for (i, (found, expected)) in found_tokens.iter().zip(expected_tokens).enumerate() {
        assert_eq!(bits(found), bits(expected), "token {i}: {what}");
        let (found, expected) = (found.margin, expected.margin);
        let close = (found - expected).abs() <= 5e-7 * (1.0 + expected.abs());
        let same = found.to_bits() == expected.to_bits();
        assert!(same || close && !same_pass, "token {i}: {found} {expected}, {what}");
    }
    assert_eq!(found.output.loss.to_bits(), expected.output.loss.to_bits(), "{what}");
    let rows = |results: &Results| -> Vec<Vec<u16>> {
        results
            .gradient
            .chunks(VOCAB)
            .map(|row| row.iter().map(|g| g.to_bits()).collect())
            .collect()
    };
    for (i, (found, expected)) in rows(found).iter().zip(&rows(expected)).enumerate() {
        assert!(found == expected, "the gradient of token {i}: {what}");
    }
}

fn of_groups(objective: Objective) -> Objective {
    objective.with_reduction(Reduction::GroupMean).unwrap()
}

/// True if gradients are divided by numbers that only a selection by the margins of all tokens tells.
fn needs_group_sizes(objective: &Objective, with: With) -> bool {
    let median = objective.selection_rule() == SelectionRule::Median;
    objective.reduction() == Reduction::GroupMean
        && match with {
            With::Nothing => median,
            With::Sequences(_) => true,
            With::Margins(_) | With::Hard(_) => false,
        }
}

/// The selection comes before the rows where only it tells how large the groups are.
pub fn gradients_wait_for_the_sizes_of_groups(backend: &dyn Backend) {
    let data = Data::new(4);
    let atkd = Objective::default();
    let offsets = [0, 30, TOKENS];
    for (objective, with) in [
        (of_groups(atkd.with_selection_rule(SelectionRule::Median)), With::Nothing),
        (of_groups(atkd), With::Sequences(&offsets)),
    ] {
        let batch = data.batch(&objective, with);
        let mut gradient = vec![bf16::ONE; TOKENS * VOCAB];
        let mut session = backend.begin(&objective, &batch).unwrap();
        let error = session.rows(0, &data.teacher, &data.student, Some(&mut gradient)).unwrap_err();
        assert!(matches!(error, Error::Stage { token: 0, .. }), "{error:?}");
        assert!(error.to_string().contains("before the rows"), "{error}");
        assert!(gradient.iter().all(|&g| g == bf16::ONE));
        // The loss alone needs them last.
        session.rows(0, &data.teacher, &data.student, None).unwrap();
        let whole = data.whole(backend, &objective, with);
        let output = session.finish().unwrap();
        assert_eq!(output.loss.to_bits(), whole.output.loss.to_bits());
    }
    // With the ratio's count the rows may come first, and some of them again.
    let cut = Cut { lengths: &[TOKENS], ..Cut::default() };
    let (_, repaired) = data.staged(backend, &of_groups(atkd), With::Nothing, cut);
    assert!(repaired > 0);
}

pub fn ranges_of_any_length_come_to_the_bits_of_one_call(backend: &dyn Backend) {
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
        of_groups(plain.with_hard_ratio(0.3).unwrap().with_ce_weight(0.4).unwrap()),
        plain.with_selection_rule(SelectionRule::Median),
        of_groups(plain.with_selection_rule(SelectionRule::Median)),
    ];
    let mut repaired = 0;
    for objective in objectives {
        for with in
            [With::Nothing, With::Sequences(&offsets), With::Margins(&margins), With::Hard(&hard)]
        {
            let whole = data.whole(backend, &objective, with);
            let selected = matches!(with, With::Nothing | With::Sequences(_));
            for (lengths, margins_first, in_place) in [
                (&[TOKENS][..], false, false),
                (&[0, 30, 3, 0, 7], false, false),
                (&[0, 30, 3, 0, 7], true, true),
                (&[1], false, true),
                (&[40], true, false),
            ] {
                if !margins_first && needs_group_sizes(&objective, with) {
                    continue;
                }
                let cut = Cut { lengths, margins_first: margins_first && selected, in_place };
                let staged = data.staged(backend, &objective, with, cut);
                let same_pass = !selected
                    || objective.target() == Target::Teacher
                    || matches!(with, With::Nothing) && !margins_first;
                let what = format!("{cut:?} {with:?} {objective:?}");
                assert_same(&staged.0, &whole, same_pass, &what);
                assert!(staged.1 == 0 || selected && !margins_first, "{what}");
                repaired += staged.1;
            }
        }
    }
    assert!(repaired > 0, "no prediction was ever wrong, so that no repair was tested");
}

/// Some tokens have their margins first and rows after the selection and the repair, the others are predicted.
pub fn margins_of_some_tokens(backend: &dyn Backend) {
    let data = Data::new(5);
    let half = TOKENS / 2 * VOCAB;
    for target in [Target::Label, Target::Teacher] {
        let objective = Objective::default().with_target(target);
        let whole = data.whole(backend, &objective, With::Nothing);
        let batch = data.batch(&objective, With::Nothing);
        let mut gradient = vec![bf16::NAN; TOKENS * VOCAB];
        let mut session = backend.begin(&objective, &batch).unwrap();
        session.margins(TOKENS / 2, &data.teacher[half..]).unwrap();
        let (teacher, student) = (&data.teacher[..half], &data.student[..half]);
        session.rows(0, teacher, student, Some(&mut gradient[..half])).unwrap();
        let mispredicted = session.select().unwrap();
        assert_eq!(session.select().unwrap(), mispredicted);
        for token in mispredicted {
            assert!(token < TOKENS / 2);
            let rows = token * VOCAB..(token + 1) * VOCAB;
            let (teacher, student) = (&data.teacher[rows.clone()], &data.student[rows.clone()]);
            session.repair(&[token], teacher, student, &mut gradient[rows]).unwrap();
        }
        assert!(session.select().unwrap().is_empty());
        let (teacher, student) = (&data.teacher[half..], &data.student[half..]);
        session.rows(TOKENS / 2, teacher, student, Some(&mut gradient[half..])).unwrap();
        let staged = Results { output: session.finish().unwrap(), gradient };
        assert_same(&staged, &whole, target == Target::Teacher, "margins of some tokens");
    }
}

/// The loss alone, of some rows or of all: no gradient has to be repaired.
pub fn ranges_without_gradients(backend: &dyn Backend) {
    let (data, objective) = (Data::new(2), Objective::default());
    let whole = data.whole(backend, &objective, With::Nothing);
    let batch = data.batch(&objective, With::Nothing);
    let half = TOKENS / 2 * VOCAB;
    for with_gradient in [false, true] {
        let mut gradient = vec![bf16::NAN; TOKENS * VOCAB - half];
        let mut session = backend.begin(&objective, &batch).unwrap();
        session.rows(0, &data.teacher[..half], &data.student[..half], None).unwrap();
        let to = with_gradient.then_some(&mut gradient[..]);
        session.rows(TOKENS / 2, &data.teacher[half..], &data.student[half..], to).unwrap();
        let mispredicted = session.select().unwrap();
        assert_eq!(mispredicted.is_empty(), !with_gradient);
        for token in mispredicted {
            assert!(token >= TOKENS / 2);
            let rows = token * VOCAB..(token + 1) * VOCAB;
            let (teacher, student) = (&data.teacher[rows.clone()], &data.student[rows.clone()]);
            let to = &mut gradient[rows.start - half..rows.end - half];
            session.repair(&[token], teacher, student, to).unwrap();
        }
        let output = session.finish().unwrap();
        assert_eq!(output.loss.to_bits(), whole.output.loss.to_bits());
        assert!(output.tokens.iter().map(bits).eq(whole.output.tokens.iter().map(bits)));
        assert!(!with_gradient || gradient == whole.gradient[half..]);
    }
}

pub fn a_batch_without_a_valid_token_has_no_loss(backend: &dyn Backend) {
    let (mut data, objective) = (Data::new(3), Objective::default());
    data.labels.fill(-100);
    let batch = data.batch(&objective, With::Nothing);
    let mut session = backend.begin(&objective, &batch).unwrap();
    let mut gradient = vec![bf16::NAN; TOKENS * VOCAB];
    session.rows(0, &data.teacher, &data.student, Some(&mut gradient)).unwrap();
    assert!(session.select().unwrap().is_empty());
    let output = session.finish().unwrap();
    assert_eq!(output.loss, 0.0);
    assert!(output.tokens.iter().all(|token| !token.valid));
    assert!(gradient.iter().all(|&g| g == bf16::ZERO));

    let none: [bf16; 0] = [];
    let batch = Batch::new(logits(&none), &[0_i64; 0]).unwrap();
    let session = backend.begin(&objective, &batch).unwrap();
    assert_eq!(session.finish().unwrap().loss, 0.0);
}

pub fn stages_out_of_order_are_errors(backend: &dyn Backend) {
    let (mut data, objective) = (Data::new(4), Objective::default());
    // Tokens that are ignored need no logits on the CPU.
    data.labels.iter_mut().for_each(|label| *label = (*label).max(0));
    let batch = data.batch(&objective, With::Nothing);
    let begin = || backend.begin(&objective, &batch).unwrap();
    let stage = |token, problem| Error::Stage { token, problem };
    let of = |first, count| first * VOCAB..(first + count) * VOCAB;
    let rows = |session: &mut Stages, first, count| {
        let (teacher, student) = (&data.teacher[of(first, count)], &data.student[of(first, count)]);
        session.rows(first, teacher, student, None)
    };

    let mut session = begin();
    rows(&mut *session, 10, 5).unwrap();
    assert_eq!(rows(&mut *session, 14, 2), Err(stage(14, "was handed over before")));
    rows(&mut *session, 15, 1).unwrap();
    assert_eq!(session.select().map(drop), Err(stage(0, "has no margin yet")));

    let mut session = begin();
    session.margins(0, &data.teacher).unwrap();
    session.select().unwrap();
    rows(&mut *session, 1, TOKENS - 1).unwrap();
    assert_eq!(session.finish().map(drop), Err(stage(0, "was never handed over")));

    let mut session = begin();
    let beyond = Error::TokenRange { first: TOKENS - 1, count: 2, tokens: TOKENS };
    let two = &data.teacher[..2 * VOCAB];
    assert_eq!(session.rows(TOKENS - 1, two, two, None), Err(beyond.clone()));
    assert_eq!(
        beyond.to_string(),
        format!("2 tokens from token {} on reach beyond the call's {TOKENS}", TOKENS - 1)
    );
    assert_eq!(session.margins(TOKENS - 1, two), Err(beyond));
    let uneven = session.rows(0, two, &data.student[..3 * VOCAB], None);
    assert!(matches!(uneven, Err(Error::ShapeMismatch { .. })));

    // A token that needs none, one twice, one that is not there; one that is left.
    let mut gradient = vec![bf16::NAN; TOKENS * VOCAB];
    session.rows(0, &data.teacher, &data.student, Some(&mut gradient)).unwrap();
    let mispredicted = session.select().unwrap();
    let right = (0..TOKENS).find(|token| !mispredicted.contains(token)).unwrap();
    let (wrong, last) = (mispredicted[0], mispredicted[mispredicted.len() - 1]);
    for tokens in [[right, wrong], [wrong, wrong], [wrong, TOKENS]] {
        let mut untouched = vec![bf16::ONE; 2 * VOCAB];
        let repair = session.repair(&tokens, two, two, &mut untouched);
        assert!(matches!(repair, Err(Error::Stage { problem: "needs no repair", .. })));
        assert!(untouched.iter().all(|&g| g == bf16::ONE));
    }
    let one = &mut gradient[..VOCAB];
    assert!(matches!(session.repair(&[wrong], two, two, one), Err(Error::ShapeMismatch { .. })));
    assert!(mispredicted.len() > 1);
    for &token in &mispredicted[..mispredicted.len() - 1] {
        let (teacher, student) = (&data.teacher[of(token, 1)], &data.student[of(token, 1)]);
        session.repair(&[token], teacher, student, &mut gradient[of(token, 1)]).unwrap();
    }
    assert_eq!(session.finish().map(drop), Err(stage(last, "waits for its repair")));
}
