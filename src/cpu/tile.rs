//! The arithmetic on one tile of a row, in float32, written once over a [`Vector`].
//!
//! A tile is a stretch of a row that stays in the first-level cache. Seven loops work on it:
//!
//! ```text
//! extent          smallest and largest logit
//! sum_exp         one model's sum of exponentials, for margins
//! exponentials    one model's exponentials, which are kept, for rows of which only some tokens have a teacher
//! sum             their sum
//! accumulate      both models' sums and the divergence's cross term; the exponentials are kept
//! sweep_again     sums of normalised probabilities, for divergences that need a second sweep
//! write_gradient  the gradient, from what the sweeps have kept and the row's scales
//! ```
//!
//! **Shifts.** Exponentials are relative to a shift that is carried from tile to tile, not to the tile's own maximum:
//! one read of the logits does. The plain loop is right only for exponents in range, and notices if one was not (see
//! [`exp`](super::exp)); the caller then looks at the extent and repeats the tile, with a larger shift or guarded.
//!
//! **Sums.** A lane adds [`PARTIAL`] vectors in float32, then adds that partial sum to a compensated one.
//!
//! **Loops by hand.** Iterator adapters and closures are not always inlined into a function with target features, and
//! then cost more than the arithmetic. [`dispatch`](super::dispatch) compiles each loop once per instruction set.

use std::ops::Range;

use super::element::Element;
use super::exp::{Exponent, exp_by, guarded_exp, in_range, tail_in_range};
use super::math::{
    Flags, Fold, Normaliser, Pair, REFERENCE, STUDENT, SecondSums, SecondSweep, Sums, TEACHER,
};
use super::vector::{MAX_LANES, Two, Vector};

/// Vectors that are added up before what that rounds off is looked after. Beside an exponential near 1 every
/// addition of a small one may be off by 6e-8: four of them in each model, and 2e-7 for the scales and
/// products, are about the 5e-7 that a gradient may be off by.
const PARTIAL: usize = 4;

/// The number that a tile's exponentials of one model are relative to, and the loop that they need.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shift {
    /// The tile's largest logit, or a little less, or anything more.
    pub value: f32,
    /// An exponential may underflow or a logit be infinite: use the guarded loop.
    pub guarded: bool,
}

/// Those of a tile of both models.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shifts {
    pub teacher: Shift,
    pub student: Shift,
    /// The third of [`RowState::shifts`](super::math::RowState::shifts).
    pub reference: f32,
}

impl Shifts {
    pub fn values(&self) -> [f32; 3] {
        [self.teacher.value, self.student.value, self.reference]
    }

    /// One loop does both models.
    pub fn guarded<F: Fold>(&self, exponent: Exponent) -> bool {
        self.teacher.guarded
            || self.student.guarded
            || F::guards_reference(self.reference - self.teacher.value, exponent)
    }
}

/// The smallest and the largest logit, NaN passed over; (+inf, -inf) for no logit.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub low: f32,
    pub high: f32,
}

/// The exponentials of a tile, written by [`accumulate`] or [`exponentials`] and read by [`write_gradient`].
pub struct Exponentials<'a> {
    /// The values that [`Fold::fold`] has returned, or [`SecondSweep::add`] thereafter; empty for a gradient without.
    pub kept: &'a mut [f32],
    pub student: &'a mut [f32],
    /// The student's at temperature 1; empty unless they are wanted.
    pub student_at_1: &'a mut [f32],
}

/// The logits to read next. Their cache lines are requested while the arithmetic runs.
#[derive(Clone, Copy)]
pub struct Prefetch {
    pub address: *const u8,
    /// Bytes of one logit.
    pub size: usize,
}

impl Prefetch {
    /// Requests the line of logit `index`, which need not exist.
    #[inline(always)]
    fn request<V: Vector>(self, index: usize) {
        V::prefetch(self.address.wrapping_add(index * self.size));
    }
}

/// The outcome of [`accumulate`].
#[derive(Clone, Copy, Debug)]
pub struct TileSums {
    /// Without the pairs that are left to [`Fold::far_term`].
    pub sums: Sums,
    /// For teacher and student: no logit is infinite or NaN, no exponential subnormal or above 2^3.5.
    pub in_range: [bool; 2],
}

/// The multipliers of a tile's exponentials in its gradient: see [`GradientScales`](super::math::GradientScales).
#[derive(Clone, Copy, Debug)]
pub struct Scales {
    pub divergence: f32,
    pub student: f32,
    pub student_at_1: f32,
}

/// The number of elements in whole vectors, and the vector of those that follow, padded with -inf.
#[inline(always)]
fn tail<L: Element, V: Vector>(x: &[L]) -> (usize, V) {
    let whole = x.len() - x.len() % V::LANES;
    (whole, padded(&x[whole..], L::NEG_INFINITY))
}

#[inline(always)]
pub fn extent<L: Element, V: Vector>(x: &[L]) -> Extent {
    let mut low = V::splat(f32::INFINITY);
    let mut high = V::splat(f32::NEG_INFINITY);
    let whole = x.len() - x.len() % V::LANES;
    let mut i = 0;
    while i < whole {
        let x: V = L::load(&x[i..i + V::LANES]);
        low = x.min_or(low);
        high = x.max_or(high);
        i += V::LANES;
    }
    let mut extent = Extent { low: low.fold(f32::min), high: high.fold(f32::max) };
    for &x in &x[whole..] {
        let x = x.widen();
        extent = Extent { low: extent.low.min(x), high: extent.high.max(x) };
    }
    extent
}

/// A compensated sum by lane: the sum, and the error that its additions have rounded off.
#[derive(Clone, Copy)]
struct Compensated<V> {
    sum: V,
    error: V,
}

impl<V: Vector> Compensated<V> {
    #[inline(always)]
    fn zero() -> Self {
        Self { sum: V::splat(0.0), error: V::splat(0.0) }
    }

    /// Adds `part`, which becomes 0. (Dekker's two-sum. If `part` is the larger, which at most doubles a sum of
    /// exponentials, the error may be off by half an ulp of it, as one plain addition is.)
    #[inline(always)]
    fn take(&mut self, part: &mut V) {
        let sum = self.sum.add(*part);
        let error = part.sub(sum.sub(self.sum));
        *self = Self { sum, error: self.error.add(error) };
        *part = V::splat(0.0);
    }

    #[inline(always)]
    fn fold(self) -> f64 {
        let mut lanes = [[0.0; MAX_LANES]; 2];
        self.sum.store::<false>(&mut lanes[0]);
        self.error.store::<false>(&mut lanes[1]);
        let mut wide = [0.0; MAX_LANES];
        let mut i = 0;
        while i < V::LANES {
            wide[i] = f64::from(lanes[0][i]) + f64::from(lanes[1][i]);
            i += 1;
        }
        // In halves, which are vectors again.
        let mut half = V::LANES / 2;
        while half > 0 {
            let mut i = 0;
            while i < half {
                wide[i] += wide[i + half];
                i += 1;
            }
            half /= 2;
        }
        wide[0]
    }
}

impl<V: Vector> Compensated<Two<V>> {
    #[inline(always)]
    fn fold_both(self) -> f64 {
        let Self { sum, error } = self;
        let first = Compensated { sum: sum.0, error: error.0 };
        first.fold() + Compensated { sum: sum.1, error: error.1 }.fold()
    }
}

/// sum e^{(x_j - shift) / T}, added as in [`accumulate`], to the same bits, and whether the tile is in range as in
/// [`TileSums::in_range`].
#[inline(always)]
pub fn sum_exp<L: Element, V: Vector, const GUARDED: bool>(
    x: &[L],
    shift: f32,
    exponent: Exponent,
    prefetch: Prefetch,
) -> (f64, bool) {
    let (whole, rest) = tail::<L, V>(x);
    let shifts = V::splat(shift);
    let (mut sum, mut total) = (V::splat(0.0), Compensated::zero());
    let mut range_bits = V::splat(0.0);
    let mut i = 0;
    while i < whole {
        let end = whole.min(i + PARTIAL * V::LANES);
        while i < end {
            prefetch.request::<V>(i);
            let x: V = L::load(&x[i..i + V::LANES]);
            sum = sum.add(exp_by::<V, GUARDED>(x.sub(shifts), exponent, &mut range_bits));
            i += V::LANES;
        }
        total.take(&mut sum);
    }
    let in_range = in_range(range_bits) && tail_in_range(&x[whole..], shift, exponent);
    sum = sum.add(guarded_exp(rest.sub(shifts), exponent, &mut range_bits));
    total.take(&mut sum);
    (total.fold(), in_range)
}

/// Writes e^{(x_j - shift) / T} to `out`, and returns whether the tile is in range as in [`TileSums::in_range`].
#[inline(always)]
pub fn exponentials<L: Element, V: Vector, const GUARDED: bool>(
    x: &[L],
    shift: f32,
    exponent: Exponent,
    out: &mut [f32],
    prefetch: Prefetch,
) -> bool {
    let (whole, rest) = tail::<L, V>(x);
    let shifts = V::splat(shift);
    let mut range_bits = V::splat(0.0);
    let mut i = 0;
    while i < whole {
        prefetch.request::<V>(i);
        let lanes = i..i + V::LANES;
        let x: V = L::load(&x[lanes.clone()]);
        let exponential = exp_by::<V, GUARDED>(x.sub(shifts), exponent, &mut range_bits);
        exponential.store::<false>(&mut out[lanes]);
        i += V::LANES;
    }
    let in_range = in_range(range_bits) && tail_in_range(&x[whole..], shift, exponent);
    let mut padded = [0.0; MAX_LANES];
    guarded_exp(rest.sub(shifts), exponent, &mut range_bits).store::<false>(&mut padded);
    out[whole..x.len()].copy_from_slice(&padded[..x.len() - whole]);
    in_range
}

/// The sum, added as in [`accumulate`].
#[inline(always)]
pub fn sum<V: Vector>(x: &[f32]) -> f64 {
    let (mut sum, mut total) = (V::splat(0.0), Compensated::zero());
    let whole = x.len() - x.len() % V::LANES;
    let mut i = 0;
    while i < whole {
        let end = whole.min(i + PARTIAL * V::LANES);
        while i < end {
            sum = sum.add(V::load(&x[i..i + V::LANES]));
            i += V::LANES;
        }
        total.take(&mut sum);
    }
    sum = padded(&x[whole..], 0.0);
    total.take(&mut sum);
    total.fold()
}

/// Partial sums by lane, and what they are relative to.
#[derive(Clone, Copy)]
struct LaneSums<V> {
    /// See [`RowState::shifts`](super::math::RowState::shifts).
    shifts: [V; 3],
    exponent: Exponent,
    teacher: V,
    cross: V,
    student: V,
    student_at_1: V,
    /// Those of the whole tile.
    flags: Flags<V>,
    /// Those of the whole tile, by [`exp`](super::exp), for the teacher and the student.
    range_bits: [V; 2],
}

impl<V: Vector> LaneSums<V> {
    /// Adds logits `a` of the teacher and `b` of the student. Returns a vector for each part of [`Exponentials`], the
    /// last one only with `CE_SUM`.
    #[inline(always)]
    fn add<F: Fold, const GUARDED: bool, const CE_SUM: bool>(&mut self, a: V, b: V) -> [V; 3] {
        let da = a.sub(self.shifts[TEACHER]);
        let db = b.sub(self.shifts[STUDENT]);
        let [teacher_bits, student_bits] = &mut self.range_bits;
        let p = exp_by::<V, GUARDED>(da, self.exponent, teacher_bits);
        let q = exp_by::<V, GUARDED>(db, self.exponent, student_bits);
        let pair = Pair {
            logits: [a, b],
            distances: [da, db],
            exponentials: [p, q],
            reference: self.shifts[REFERENCE],
            exponent: self.exponent,
        };
        let kept = F::fold::<V, GUARDED>(&pair, &mut self.cross, &mut self.flags);
        self.teacher = self.teacher.add(p);
        self.student = self.student.add(q);
        let mut q_at_1 = V::splat(0.0);
        if CE_SUM {
            q_at_1 = exp_by::<V, GUARDED>(db, Exponent::new(1.0), student_bits);
            self.student_at_1 = self.student_at_1.add(q_at_1);
        }
        [kept, q, q_at_1]
    }

    /// Moves the partial sums into the totals of teacher, cross term, student and student at temperature 1.
    #[inline(always)]
    fn flush<const CE_SUM: bool>(&mut self, totals: &mut [Compensated<V>; 4]) {
        totals[0].take(&mut self.teacher);
        totals[1].take(&mut self.cross);
        totals[2].take(&mut self.student);
        if CE_SUM {
            totals[3].take(&mut self.student_at_1);
        }
    }
}

/// Sums over one tile of the teacher's and the student's logits, whose exponentials it leaves in `out`.
#[inline(always)]
pub fn accumulate<L: Element, V: Vector, F: Fold, const GUARDED: bool, const CE_SUM: bool>(
    teacher: &[L],
    student: &[L],
    shifts: [f32; 3],
    exponent: Exponent,
    out: &mut Exponentials,
    prefetch: [Prefetch; 2],
) -> TileSums {
    let zero = V::splat(0.0);
    let mut sums = LaneSums {
        shifts: [V::splat(shifts[0]), V::splat(shifts[1]), V::splat(shifts[2])],
        exponent,
        teacher: zero,
        cross: zero,
        student: zero,
        student_at_1: zero,
        flags: Flags { mismatch: zero, far: zero },
        range_bits: [zero; 2],
    };
    let mut totals = [Compensated::<V>::zero(); 4];
    let (whole, a_rest) = tail::<L, V>(teacher);
    let (_, b_rest) = tail::<L, V>(student);
    let mut i = 0;
    while i < whole {
        let end = whole.min(i + PARTIAL * V::LANES);
        while i < end {
            prefetch[TEACHER].request::<V>(i);
            prefetch[STUDENT].request::<V>(i);
            let lanes = i..i + V::LANES;
            let a: V = L::load(&teacher[lanes.clone()]);
            let b: V = L::load(&student[lanes.clone()]);
            let [kept, q, q_at_1] = sums.add::<F, GUARDED, CE_SUM>(a, b);
            kept.store::<false>(&mut out.kept[lanes.clone()]);
            q.store::<false>(&mut out.student[lanes.clone()]);
            if CE_SUM {
                q_at_1.store::<false>(&mut out.student_at_1[lanes]);
            }
            i += V::LANES;
        }
        sums.flush::<CE_SUM>(&mut totals);
    }
    let mut in_range = [in_range(sums.range_bits[TEACHER]), in_range(sums.range_bits[STUDENT])];
    if whole < teacher.len() {
        let (a, b) = (&teacher[whole..], &student[whole..]);
        in_range[TEACHER] &= tail_in_range(a, shifts[TEACHER], exponent);
        in_range[STUDENT] &= tail_in_range(b, shifts[STUDENT], exponent);
        if CE_SUM {
            in_range[STUDENT] &= tail_in_range(b, shifts[STUDENT], Exponent::new(1.0));
        }
        let [kept, q, q_at_1] = sums.add::<F, true, CE_SUM>(a_rest, b_rest);
        let mut padded = [0.0; MAX_LANES];
        let left = teacher.len() - whole;
        kept.store::<false>(&mut padded);
        out.kept[whole..].copy_from_slice(&padded[..left]);
        q.store::<false>(&mut padded);
        out.student[whole..].copy_from_slice(&padded[..left]);
        if CE_SUM {
            q_at_1.store::<false>(&mut padded);
            out.student_at_1[whole..].copy_from_slice(&padded[..left]);
        }
        sums.flush::<CE_SUM>(&mut totals);
    }
    TileSums {
        sums: Sums {
            teacher: totals[0].fold(),
            cross: totals[1].fold(),
            student: totals[2].fold(),
            student_at_1: if CE_SUM { totals[3].fold() } else { 0.0 },
            mismatch: sums.flags.mismatch.fold(f32::max) > 0.0,
            far: sums.flags.far.fold(f32::max) > 0.0,
        },
        in_range,
    }
}

/// The shifts of a tile, for its second sweep, and the factors that go with them.
#[derive(Clone, Copy, Debug)]
pub struct TileShifts {
    pub shifts: [f32; 2],
    pub normaliser: Normaliser,
}

/// One vector of a second sweep, from the logits and what [`accumulate`] has kept.
#[inline(always)]
fn add_again<V: Vector, S: SecondSweep>(
    second: S,
    logits: [V; 2],
    exponentials: [V; 2],
    of_tile: &TileShifts,
    sums: &mut SecondSums<V>,
) -> V {
    let mut distances = [V::splat(0.0); 2];
    if S::DISTANCES {
        distances[TEACHER] = logits[TEACHER].sub(V::splat(of_tile.shifts[TEACHER]));
        distances[STUDENT] = logits[STUDENT].sub(V::splat(of_tile.shifts[STUDENT]));
    }
    second.add(distances, exponentials, &of_tile.normaliser, sums)
}

/// The second sweep over a tile, or more of the same shifts. What was kept becomes the gradient's.
#[inline(always)]
pub fn sweep_again<L: Element, V: Vector, S: SecondSweep>(
    second: S,
    teacher: &[L],
    student: &[L],
    of_tile: &TileShifts,
    exponentials: &mut Exponentials,
) -> SecondSums<f64> {
    let lanes = Two::<V>::LANES;
    let zero = Two::<V>::splat(0.0);
    let (kept, q) = (&mut *exponentials.kept, &*exponentials.student);
    let mut sums = [zero; 3];
    let mut totals = [Compensated::<Two<V>>::zero(); 3];
    let whole = teacher.len() - teacher.len() % lanes;
    let mut i = 0;
    while i < whole {
        let end = whole.min(i + PARTIAL * lanes);
        while i < end {
            let at = i..i + lanes;
            let mut logits = [zero; 2];
            if S::DISTANCES {
                logits[TEACHER] = L::load(&teacher[at.clone()]);
                logits[STUDENT] = L::load(&student[at.clone()]);
            }
            let both = [Two::load(&kept[at.clone()]), Two::load(&q[at.clone()])];
            let found = add_again(second, logits, both, of_tile, &mut sums);
            found.store::<false>(&mut kept[at]);
            i += lanes;
        }
        totals[0].take(&mut sums[0]);
        totals[1].take(&mut sums[1]);
        totals[2].take(&mut sums[2]);
    }
    while i < teacher.len() {
        let at = i..teacher.len().min(i + V::LANES);
        let logits = [
            padded::<L, V>(&teacher[at.clone()], L::NEG_INFINITY),
            padded(&student[at.clone()], L::NEG_INFINITY),
        ];
        let both = [padded::<f32, V>(&kept[at.clone()], 0.0), padded(&q[at.clone()], 0.0)];
        let mut rest = [V::splat(0.0); 3];
        let found = add_again(second, logits, both, of_tile, &mut rest);
        let mut out = [0.0; MAX_LANES];
        found.store::<false>(&mut out);
        kept[at.clone()].copy_from_slice(&out[..at.len()]);
        totals[0].take(&mut Two(rest[0], V::splat(0.0)));
        totals[1].take(&mut Two(rest[1], V::splat(0.0)));
        totals[2].take(&mut Two(rest[2], V::splat(0.0)));
        i = at.end;
    }
    let sums = [totals[0].fold_both(), totals[1].fold_both(), totals[2].fold_both()];
    S::normalised(sums, of_tile.normaliser.factors)
}

/// A vector of as many elements as there are, and padding.
#[inline(always)]
fn padded<L: Element, V: Vector>(x: &[L], padding: L) -> V {
    let mut padded = [padding; MAX_LANES];
    padded[..x.len()].copy_from_slice(x);
    L::load(&padded)
}

/// One vector of the gradient, of the elements from `at` on. `from` has the parts of [`Exponentials`].
#[inline(always)]
fn gradient<V: Vector>(from: [&[f32]; 3], scales: Scales, at: usize) -> V {
    let [kept, q, q_at_1] = from;
    let lanes = at..at + V::LANES;
    let student = V::load(&q[lanes.clone()]);
    let mut sum = student.mul(V::splat(scales.student));
    if !kept.is_empty() {
        sum = V::load(&kept[lanes.clone()]).mul_add(V::splat(scales.divergence), sum);
    }
    if q_at_1.is_empty() {
        return sum;
    }
    V::load(&q_at_1[lanes]).mul_add(V::splat(scales.student_at_1), sum)
}

/// The gradient of a range too short for a vector.
#[inline(always)]
fn write_partial_vector<G: Element, V: Vector>(
    from: [&[f32]; 3],
    scales: Scales,
    range: Range<usize>,
    to: &mut [G],
) {
    if range.is_empty() {
        return;
    }
    let mut padded = [[0.0; MAX_LANES]; 3];
    for (padded, from) in padded.iter_mut().zip(from) {
        if !from.is_empty() {
            padded[..range.len()].copy_from_slice(&from[range.clone()]);
        }
    }
    let [kept, q, q_at_1] = &padded;
    let kept: &[f32] = if from[0].is_empty() { &[] } else { kept };
    let q_at_1: &[f32] = if from[2].is_empty() { &[] } else { q_at_1 };
    let sum = gradient::<V>([kept, q, q_at_1], scales, 0);
    let mut out = [G::default(); MAX_LANES];
    G::store::<V, false>(sum, &mut out);
    to[range.clone()].copy_from_slice(&out[..range.len()]);
}

/// Writes the gradient of a tile. `NON_TEMPORAL` stores begin at the first element that is aligned to a vector.
#[inline(always)]
pub fn write_gradient<G: Element, V: Vector, const NON_TEMPORAL: bool>(
    from: &Exponentials,
    scales: Scales,
    to: &mut [G],
) {
    let from = [&*from.kept, &*from.student, &*from.student_at_1];
    let mut i = 0;
    if NON_TEMPORAL {
        let behind = to.as_ptr().addr() % (V::LANES * size_of::<G>()) / size_of::<G>();
        i = if behind == 0 { 0 } else { to.len().min(V::LANES - behind) };
        write_partial_vector::<G, V>(from, scales, 0..i, to);
    }
    while i + V::LANES <= to.len() {
        let sum = gradient::<V>(from, scales, i);
        G::store::<V, NON_TEMPORAL>(sum, &mut to[i..i + V::LANES]);
        i += V::LANES;
    }
    write_partial_vector::<G, V>(from, scales, i..to.len(), to);
}
