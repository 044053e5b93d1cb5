//! One row at a time: the sums in a sweep over its logits, then the gradient from cached exponentials.
//!
//! A row is cut into tiles, which the target ends: it belongs to none. The sweep carries a shift per model from tile to
//! tile. A tile whose exponents leave the range is repeated against a larger shift or by the guarded loop, and the row's
//! state is rescaled to the tile's shifts before its sums are added. Exponentials stay as they were written, relative to
//! their own tile's shifts; neighbouring tiles of equal shifts form a *run*, and the gradient takes scales per run.

mod rest;

use std::ops::{Deref, DerefMut, Range};

use half::slice::HalfFloatSliceExt;

use super::dispatch::Instructions;
use super::element::Element;
use super::exp::Exponent;
use super::math::{
    self, Fold, GradientScales, Margins, Moved, Normaliser, RowDivergence, RowState, STUDENT,
    SecondSweep, TEACHER, by_family,
};
use super::tile::{Exponentials, Extent, Prefetch, Scales, Shift, Shifts, TileShifts, TileSums};
use super::vector::fence;
use crate::Result;
use crate::logits::{Elements, ElementsMut};
use crate::objective::Objective;

/// Vectors in a tile: few enough that two models' tiles stay in the first-level cache, and that the errors
/// of float32 sums, which all go one way where logits are equal, stay far below what the loss may be off;
/// enough that the work between tiles does not count.
const VECTORS: usize = 64;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Logits at the start of a row whose largest is the row's first shift.
const INITIAL: usize = 256;

/// How far a logit over the temperature may exceed the shift. The sums lose no digits to it, and most tiles are done
/// once.
const HEADROOM: f64 = 2.0;

/// The tiles of a row; the target belongs to none. Every tile starts where a cache line does if the row does, except
/// the one that follows the target.
fn tiles(vocab: usize, target: usize, tile: usize) -> impl Iterator<Item = Range<usize>> {
    (0..vocab).step_by(tile).flat_map(move |start| {
        let end = vocab.min(start + tile);
        let cut = target.clamp(start, end);
        let behind = if cut == target { cut + 1 } else { cut };
        [start..cut, behind..end].into_iter().filter(|tile| !tile.is_empty())
    })
}

/// The logits that follow the tile in memory: the next tile, or the start of the next row.
fn prefetch_after(row: Elements, tile: &Range<usize>) -> Prefetch {
    let size = row.dtype().size();
    Prefetch { address: row.as_ptr().wrapping_add(tile.end * size), size }
}

/// The elements as float32: themselves, or converted into `buffer`.
pub(crate) fn widen<'a>(elements: Elements<'a>, buffer: &'a mut [f32]) -> &'a [f32] {
    let buffer = &mut buffer[..elements.len()];
    match elements {
        Elements::F32(slice) => return slice,
        Elements::F16(slice) => slice.convert_to_f32_slice(buffer),
        Elements::Bf16(slice) => {
            for (wide, narrow) in buffer.iter_mut().zip(slice) {
                *wide = narrow.widen();
            }
        }
    }
    buffer
}

/// The destination of a row's gradient.
pub struct Destination<'a> {
    pub row: ElementsMut<'a>,
    /// Use non-temporal stores: the row is not in the cache, and will not be read from it soon.
    pub non_temporal: bool,
}

/// A buffer whose first element starts a cache line.
#[derive(Default)]
struct Aligned {
    memory: Vec<f32>,
    start: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let mut memory = vec![0.0; len + LINE / size_of::<f32>() - 1];
        let start = memory.as_ptr().align_offset(LINE).min(memory.len() - len);
        memory.truncate(start + len);
        Self { memory, start }
    }
}

impl Deref for Aligned {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.memory[self.start..]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.memory[self.start..]
    }
}

/// A thread's own memory, reused from row to row.
pub struct Scratch {
    /// The parts of [`Exponentials`], at the index of their logit: a whole row's for a gradient or a second sweep, else
    /// one tile's.
    kept: Aligned,
    student: Aligned,
    student_at_1: Aligned,
    /// The runs of the row at work, each with the shifts of its exponentials.
    runs: Vec<(Range<usize>, [f32; 3])>,
    /// One tile of each model, widened to float32.
    wide_teacher: Aligned,
    wide_student: Aligned,
}

impl Scratch {
    /// The memory for widened tiles, to be put back: a sweep borrows the rest beside it.
    fn take_wide(&mut self) -> [Aligned; 2] {
        [&mut self.wide_teacher, &mut self.wide_student].map(std::mem::take)
    }

    /// Adds a range of the row whose exponentials have these shifts.
    fn add_run(&mut self, range: Range<usize>, shifts: [f32; 3]) {
        match self.runs.last_mut() {
            Some((run, of_run)) if run.end == range.start && *of_run == shifts => {
                run.end = range.end;
            }
            _ => self.runs.push((range, shifts)),
        }
    }

    fn exponentials(&mut self, range: Range<usize>) -> Exponentials<'_> {
        let at_1 = !self.student_at_1.is_empty();
        let kept = if self.kept.is_empty() { 0..0 } else { range.clone() };
        Exponentials {
            kept: &mut self.kept[kept],
            student: &mut self.student[range.clone()],
            student_at_1: if at_1 { &mut self.student_at_1[range] } else { &mut [] },
        }
    }
}

/// Everything that is the same for all rows of a call, or of one temperature.
#[derive(Clone, Copy)]
pub struct RowPass {
    instructions: Instructions,
    /// Logits in a tile.
    tile: usize,
    pub exponent: Exponent,
    /// That of `exponent`.
    pub inverse_temperature: f64,
    /// Cross entropy is wanted.
    cross_entropy: bool,
    /// It has a sum of its own: the divergences may be at another temperature.
    pub at_1: bool,
    /// The divergence needs a second sweep.
    again: bool,
    /// The divergence is over the whole vocabulary.
    plain: bool,
}

impl RowPass {
    /// With the instructions given, or the chosen ones.
    ///
    /// # Errors
    /// Those of [`Instructions::chosen`].
    pub fn new(instructions: Option<Instructions>, objective: &Objective) -> Result<Self> {
        let instructions = instructions.map_or_else(Instructions::chosen, Ok)?;
        let exponent = Exponent::new(1.0 / objective.temperature());
        Ok(Self {
            instructions,
            tile: VECTORS * instructions.lanes(),
            exponent,
            inverse_temperature: exponent.inverse_temperature(),
            cross_entropy: objective.ce_weight() != 0.0,
            at_1: objective.ce_weight() != 0.0 && objective.temperature() != 1.0,
            again: by_family!(objective, divergence => divergence.second().is_some()),
            plain: objective.is_plain(),
        })
    }

    /// The same for rows that have temperatures of their own.
    pub fn of_any_temperature(self) -> Self {
        Self { at_1: self.cross_entropy, ..self }
    }

    /// The same for rows of which cross entropy at temperature 1 is taken apart.
    pub fn without_cross_entropy(self) -> Self {
        Self { at_1: false, ..self }
    }

    /// The same for rows of another temperature.
    pub fn at(self, temperature: f64) -> Self {
        let exponent = Exponent::new(1.0 / temperature);
        Self { exponent, inverse_temperature: exponent.inverse_temperature(), ..self }
    }

    /// Memory for the rows that one thread does. It holds a whole row's exponentials if gradients are wanted, or a
    /// second sweep.
    pub fn scratch(&self, vocab: usize, with_gradient: bool) -> Scratch {
        let kept = if with_gradient || self.again { vocab } else { self.tile.min(vocab) };
        Scratch {
            kept: Aligned::new(kept),
            student: Aligned::new(kept),
            student_at_1: Aligned::new(if self.at_1 { kept } else { 0 }),
            runs: Vec::with_capacity(vocab / self.tile + 3),
            wide_teacher: Aligned::new(self.tile),
            wide_student: Aligned::new(self.tile),
        }
    }

    /// The index of the largest logit, the lowest among equals, 0 if there is nothing but NaN and -inf.
    pub fn arg_max(&self, row: Elements, scratch: &mut Scratch) -> usize {
        let mut best = (f32::NEG_INFINITY, 0);
        for start in (0..row.len()).step_by(self.tile) {
            let range = start..row.len().min(start + self.tile);
            let logits = widen(row.slice(range), &mut scratch.wide_teacher);
            let max = self.instructions.extent(logits).high;
            if max > best.0 {
                let offset = logits.iter().position(|&z| z == max).expect("the maximum is there");
                best = (max, start + offset);
            }
        }
        best.1
    }

    /// The first shift of a row, from the row's start.
    fn initial_shift<L: Element>(&self, logits: &[L]) -> Shift {
        let max = self.instructions.extent(&logits[..logits.len().min(INITIAL)]).high;
        Shift { value: max.max(RowState::NO_SHIFT as f32), guarded: false }
    }

    /// The shift that a tile of this extent needs, where the tiles before it had `shift`.
    fn adjusted(&self, shift: Shift, extent: Extent) -> Shift {
        let excess = f64::from(extent.high) - f64::from(shift.value);
        // At temperature 1 the same distance may be a larger exponent.
        let steepest =
            if self.at_1 { self.inverse_temperature.max(1.0) } else { self.inverse_temperature };
        let value = if excess * steepest > HEADROOM { extent.high } else { shift.value };
        let depth = extent.low - value;
        let guarded = shift.guarded
            || !extent.low.is_finite()
            || self.exponent.underflows(depth)
            || (self.at_1 && Exponent::new(1.0).underflows(depth));
        Shift { value, guarded }
    }

    /// The sum of a tile's exponentials, and its shift, given that of the tile before.
    fn sum<L: Element>(
        &self,
        logits: &[L],
        before: Option<Shift>,
        prefetch: Prefetch,
    ) -> (f64, Shift) {
        let mut shift = before.unwrap_or_else(|| self.initial_shift(logits));
        loop {
            let (sum, in_range) = self.instructions.sum_exp(logits, shift, self.exponent, prefetch);
            if in_range {
                return (sum, shift);
            }
            match self.adjusted(shift, self.instructions.extent(logits)) {
                adjusted if adjusted == shift => return (sum, shift),
                adjusted => shift = adjusted,
            }
        }
    }

    /// The first shifts of a row, from the row's start.
    fn initial_shifts<L: Element, F: Fold>(&self, [a, b]: [&[L]; 2]) -> Shifts {
        let (teacher, student) = (self.initial_shift(a), self.initial_shift(b));
        Shifts { teacher, student, reference: reference::<L, F>([a, b], teacher, student) }
    }

    /// The sums over a tile of both models, and its shifts, given those of the tile before.
    fn sums<L: Element, F: Fold>(
        &self,
        logits: [&[L]; 2],
        before: Option<Shifts>,
        mut out: Exponentials,
        prefetch: [Prefetch; 2],
    ) -> (math::Sums, Shifts) {
        let mut shifts = before.unwrap_or_else(|| self.initial_shifts::<L, F>(logits));
        loop {
            let TileSums { mut sums, in_range } = self.instructions.accumulate::<L, F>(
                logits,
                &shifts,
                self.exponent,
                &mut out,
                prefetch,
            );
            // Neither depends on the other's logits: tokens with equal teachers have equal margins.
            let adjusted = |model: usize, shift| match in_range[model] {
                true => shift,
                false => self.adjusted(shift, self.instructions.extent(logits[model])),
            };
            let teacher = adjusted(TEACHER, shifts.teacher);
            let student = adjusted(STUDENT, shifts.student);
            let reference = match student.value == shifts.student.value {
                true => shifts.reference,
                false => reference::<L, F>(logits, teacher, student),
            };
            let adjusted = Shifts { teacher, student, reference };
            if adjusted == shifts {
                if sums.far {
                    sums.cross += self.far_terms::<L, F>(logits, shifts.values());
                }
                return (sums, shifts);
            }
            shifts = adjusted;
        }
    }

    /// The cross terms that the tile's loop has left out.
    fn far_terms<L: Element, F: Fold>(
        &self,
        [teacher, student]: [&[L]; 2],
        shifts: [f32; 3],
    ) -> f64 {
        let pairs = teacher.iter().zip(student).map(|(a, b)| [a.widen(), b.widen()]);
        pairs
            .filter(|logits| logits.iter().all(|&z| z >= f32::MIN))
            .map(|logits| F::far_term(logits, shifts, self.exponent))
            .sum()
    }

    /// The teacher's margin at `target`, from its logits alone: the bits of [`margin_of`](Self::margin_of).
    pub fn margin(&self, row: Elements, target: usize) -> f64 {
        let (mut shift, mut total) = (RowState::NO_SHIFT, 0.0);
        let mut before = None;
        for range in tiles(row.len(), target, self.tile) {
            let prefetch = prefetch_after(row, &range);
            let (sum, to) = match row.slice(range) {
                Elements::F32(logits) => self.sum(logits, before, prefetch),
                Elements::F16(logits) => self.sum(logits, before, prefetch),
                Elements::Bf16(logits) => self.sum(logits, before, prefetch),
            };
            before = Some(to);
            let moved = shift - f64::from(to.value);
            total *= (moved * self.inverse_temperature).exp();
            total += sum;
            shift = to.value.into();
        }
        math::margin(shift, total, row.get(target).into(), self.inverse_temperature)
    }

    /// The same for the first sweep alone, after which nothing is kept.
    pub fn of_first_sweep(self) -> Self {
        Self { again: false, ..self }
    }

    /// A model's margin at a target of this logit, from the state of the row.
    pub fn margin_of(&self, state: &RowState, model: usize, target: f32) -> f64 {
        let sum = [state.sums.teacher, state.sums.student][model];
        math::margin(state.shifts[model], sum, target.into(), self.inverse_temperature)
    }

    /// The state of a row, from all of its sweeps. What they keep stays in `scratch`.
    pub fn state<D: RowDivergence>(
        &self,
        divergence: D,
        teacher: Elements,
        student: Elements,
        target: usize,
        scratch: &mut Scratch,
    ) -> RowState {
        let of_target = [teacher.get(target), student.get(target)];
        let margins = |state: &RowState| self.margins_of(state, of_target);
        self.state_by(divergence, teacher, student, target, margins, scratch)
    }

    /// [`state`](Self::state) where the margins of the target are not those that its logits here have.
    pub fn state_by<D: RowDivergence>(
        &self,
        divergence: D,
        teacher: Elements,
        student: Elements,
        target: usize,
        margins: impl Fn(&RowState) -> Margins,
        scratch: &mut Scratch,
    ) -> RowState {
        let mut state = self.first_sweep::<D::Fold>(teacher, student, Some(target), scratch);
        let counted = (self.again && self.plain).then(|| margins(&state));
        let sums = self.sweep_again(divergence, teacher, student, &state, counted, scratch);
        if let Some(sums) = sums {
            state.found = divergence.found(sums, counted);
        }
        state
    }

    /// Both models' margins at a target of these logits.
    fn margins_of(&self, state: &RowState, [teacher, student]: [f32; 2]) -> Margins {
        let margin = |model, target| self.margin_of(state, model, target);
        Margins { u: margin(TEACHER, teacher), w: margin(STUDENT, student) }
    }

    /// The margins of the target, which has these logits, if it counts in a second sweep.
    pub fn counted(&self, state: &RowState, target: [f32; 2]) -> Option<Margins> {
        (self.again && self.plain).then(|| self.margins_of(state, target))
    }

    /// Makes what the first sweep over a row, or a part of it, has kept what the gradient needs, given the state of the
    /// whole row and the margins of a target that counts. Returns the sums of the second sweep, if the divergence has one.
    pub fn sweep_again<D: RowDivergence>(
        &self,
        divergence: D,
        teacher: Elements,
        student: Elements,
        state: &RowState,
        counted: Option<Margins>,
        scratch: &mut Scratch,
    ) -> Option<math::SecondSums<f64>> {
        if let Some(second) = divergence.second() {
            return Some(self.second_sweep(second, teacher, student, state, counted, scratch));
        }
        if D::KEEPS_FAR && state.sums.far && scratch.kept.len() >= teacher.len() {
            for i in scratch.runs.iter().flat_map(|(run, _)| run.clone()) {
                let logits = [teacher.get(i), student.get(i)];
                scratch.kept[i] = divergence.far_kept(logits, state, self.exponent);
            }
        }
        None
    }

    /// The sums of a row, or of a part of it, with the target left out if it is there.
    pub fn first_sweep<F: Fold>(
        &self,
        teacher: Elements,
        student: Elements,
        target: Option<usize>,
        scratch: &mut Scratch,
    ) -> RowState {
        let [mut wide_teacher, mut wide_student] = scratch.take_wide();
        let target = target.unwrap_or(usize::MAX);
        let mut state = RowState::empty();
        let whole_row = scratch.kept.len() >= teacher.len();
        scratch.runs.clear();
        let mut before = None;
        for range in tiles(teacher.len(), target, self.tile) {
            let prefetch = [prefetch_after(teacher, &range), prefetch_after(student, &range)];
            let logits = (teacher.slice(range.clone()), student.slice(range.clone()));
            let place = if whole_row { range.clone() } else { 0..range.len() };
            let out = scratch.exponentials(place);
            let (sums, tile_shifts) = match logits {
                (Elements::F16(a), Elements::F16(b)) => {
                    self.sums::<_, F>([a, b], before, out, prefetch)
                }
                (Elements::Bf16(a), Elements::Bf16(b)) => {
                    self.sums::<_, F>([a, b], before, out, prefetch)
                }
                (a, b) => {
                    let wide = [widen(a, &mut wide_teacher), widen(b, &mut wide_student)];
                    self.sums::<_, F>(wide, before, out, prefetch)
                }
            };
            before = Some(tile_shifts);
            let shifts = tile_shifts.values();
            state.rescale::<F>(shifts.map(f64::from), self.inverse_temperature);
            state.sums += sums;
            scratch.add_run(range, shifts);
        }
        if !self.at_1 {
            state.sums.student_at_1 = state.sums.student;
        }
        [scratch.wide_teacher, scratch.wide_student] = [wide_teacher, wide_student];
        state
    }

    /// The sums of the second sweep over a row that the first one has been over, of probabilities off the target: in the
    /// whole vocabulary if the target counts, which then has the margins given.
    fn second_sweep<S: SecondSweep>(
        &self,
        second: S,
        teacher: Elements,
        student: Elements,
        state: &RowState,
        counted: Option<Margins>,
        scratch: &mut Scratch,
    ) -> math::SecondSums<f64> {
        let [mut wide_teacher, mut wide_student] = scratch.take_wide();
        let mut totals = [0.0; 3];
        let runs = std::mem::take(&mut scratch.runs);
        for &(ref run, shifts) in &runs {
            let moved = self.moved(shifts, state);
            let normaliser = Normaliser::new(state, &moved, counted, self.exponent);
            let of_tile = TileShifts { shifts: [shifts[TEACHER], shifts[STUDENT]], normaliser };
            // Only what has to be widened is cut into tiles.
            let tile = if teacher.dtype() == student.dtype() { run.len() } else { self.tile };
            for start in run.clone().step_by(tile) {
                let range = start..run.end.min(start + tile);
                let logits = (teacher.slice(range.clone()), student.slice(range.clone()));
                let kept = &mut scratch.exponentials(range);
                let sums = match logits {
                    (Elements::F32(a), Elements::F32(b)) => {
                        self.instructions.sweep_again(second, [a, b], &of_tile, kept)
                    }
                    (Elements::F16(a), Elements::F16(b)) => {
                        self.instructions.sweep_again(second, [a, b], &of_tile, kept)
                    }
                    (Elements::Bf16(a), Elements::Bf16(b)) => {
                        self.instructions.sweep_again(second, [a, b], &of_tile, kept)
                    }
                    (a, b) => {
                        let wide = [widen(a, &mut wide_teacher), widen(b, &mut wide_student)];
                        self.instructions.sweep_again(second, wide, &of_tile, kept)
                    }
                };
                for (total, sum) in totals.iter_mut().zip(sums) {
                    *total += sum;
                }
            }
        }
        scratch.runs = runs;
        [scratch.wide_teacher, scratch.wide_student] = [wide_teacher, wide_student];
        totals
    }

    /// Writes the gradient of a run.
    fn write_run(
        &self,
        from: &Exponentials,
        scales: Scales,
        range: Range<usize>,
        to: &mut Destination,
    ) {
        let (on, non_temporal) = (self.instructions, to.non_temporal);
        match to.row.slice(range) {
            ElementsMut::F32(out) => on.write_gradient(from, scales, out, non_temporal),
            ElementsMut::F16(out) => on.write_gradient(from, scales, out, non_temporal),
            ElementsMut::Bf16(out) => on.write_gradient(from, scales, out, non_temporal),
        }
    }

    /// The way from a run's shifts to the row's.
    fn moved(&self, shifts: [f32; 3], state: &RowState) -> Moved {
        Moved::by(shifts.map(f64::from), state.shifts, self.inverse_temperature)
    }

    /// Writes the gradient of the row, or of the part of it, of which the sweeps have left what they keep in `scratch`.
    /// `state` is that of the whole row, and `target` an index into the part that has it.
    pub fn gradient<D: RowDivergence>(
        &self,
        divergence: D,
        state: &RowState,
        scales: &GradientScales,
        target: Option<usize>,
        scratch: &mut Scratch,
        mut to: Destination,
    ) {
        let runs = std::mem::take(&mut scratch.runs);
        for &(ref range, shifts) in &runs {
            let moved = self.moved(shifts, state);
            let coefficients = [scales.divergence, scales.student];
            let [kept, student] = divergence.rescaled_coefficients(state, coefficients, &moved);
            let scales = Scales {
                divergence: kept as f32,
                student: student as f32,
                student_at_1: (scales.student_at_1 * moved.distances[STUDENT].exp()) as f32,
            };
            self.write_run(&scratch.exponentials(range.clone()), scales, range.clone(), &mut to);
        }
        scratch.runs = runs;
        if let Some(target) = target {
            to.row.set(target, scales.target as f32);
        }
        if to.non_temporal {
            fence();
        }
    }
}

/// The teacher's logit where the student's shift was found; any number if that is -inf, or the shift is no logit.
fn reference<L: Element, F: Fold>([a, b]: [&[L]; 2], teacher: Shift, student: Shift) -> f32 {
    if !F::REFERENCE {
        return 0.0;
    }
    let at = b.iter().position(|b| b.widen() == student.value);
    at.map(|at| a[at].widen()).filter(|a| a.is_finite()).unwrap_or(teacher.value)
}
