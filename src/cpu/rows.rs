//! One row at a time: the sums in a sweep over its logits, then the gradient from cached exponentials.
//!
//! A row is cut into tiles, which the target ends: it belongs to none. The sweep carries a shift per model from tile to
//! tile. A tile whose exponents leave the range is repeated against a larger shift or by the guarded loop, and the row's
//! state is rescaled to the tile's shifts before its sums are added. Exponentials stay as they were written, relative to
//! their own tile's shifts; neighbouring tiles of equal shifts form a *run*, and the gradient takes scales per run.

use std::ops::{Deref, DerefMut, Range};

use half::slice::HalfFloatSliceExt;

use super::dispatch::Instructions;
use super::element::Element;
use super::exp::Exponent;
use super::math::{self, Divergence, GradientScales, RowState, STUDENT, TEACHER};
use super::tile::{Exponentials, Extent, Prefetch, Scales, Shift, TileSums};
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
fn widen<'a>(elements: Elements<'a>, buffer: &'a mut [f32]) -> &'a [f32] {
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
    /// The parts of [`Exponentials`], at the index of their logit: a whole row's for a gradient, else one tile's.
    kept: Aligned,
    student: Aligned,
    student_at_1: Aligned,
    /// The runs of the row at work, each with the shifts of its exponentials.
    runs: Vec<(Range<usize>, [f32; 2])>,
    /// One tile of each model, widened to float32.
    wide_teacher: Aligned,
    wide_student: Aligned,
}

impl Scratch {
    fn exponentials(&mut self, range: Range<usize>) -> Exponentials<'_> {
        let at_1 = !self.student_at_1.is_empty();
        Exponentials {
            kept: &mut self.kept[range.clone()],
            student: &mut self.student[range.clone()],
            student_at_1: if at_1 { &mut self.student_at_1[range] } else { &mut [] },
        }
    }
}

/// Everything that is the same for all rows of a call.
pub struct RowPass {
    instructions: Instructions,
    /// Logits in a tile.
    tile: usize,
    exponent: Exponent,
    /// That of `exponent`.
    pub inverse_temperature: f64,
    /// Cross entropy is wanted at another temperature than the divergences.
    at_1: bool,
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
            at_1: objective.ce_weight() != 0.0 && objective.temperature() != 1.0,
        })
    }

    /// Memory for the rows that one thread does. It holds a whole row's exponentials if gradients are wanted.
    pub fn scratch(&self, vocab: usize, with_gradient: bool) -> Scratch {
        let kept = if with_gradient { vocab } else { self.tile.min(vocab) };
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

    /// The sums over a tile of both models, and its shifts, given those of the tile before.
    fn sums<L: Element, D: Divergence>(
        &self,
        logits: [&[L]; 2],
        before: Option<[Shift; 2]>,
        mut out: Exponentials,
        prefetch: [Prefetch; 2],
    ) -> (math::Sums, [Shift; 2]) {
        let mut shifts = before.unwrap_or_else(|| logits.map(|logits| self.initial_shift(logits)));
        loop {
            let TileSums { mut sums, far, in_range } = self.instructions.accumulate::<L, D>(
                logits,
                shifts,
                self.exponent,
                &mut out,
                prefetch,
            );
            // Neither depends on the other's logits: tokens with equal teachers have equal margins.
            let adjusted = [TEACHER, STUDENT].map(|model| match in_range[model] {
                true => shifts[model],
                false => self.adjusted(shifts[model], self.instructions.extent(logits[model])),
            });
            if adjusted == shifts {
                if far {
                    sums.cross += self.far_terms::<L, D>(logits, shifts.map(|shift| shift.value));
                }
                return (sums, shifts);
            }
            shifts = adjusted;
        }
    }

    /// The cross terms that the tile's loop has left out.
    fn far_terms<L: Element, D: Divergence>(
        &self,
        [teacher, student]: [&[L]; 2],
        shifts: [f32; 2],
    ) -> f64 {
        let pairs = teacher.iter().zip(student).map(|(a, b)| [a.widen(), b.widen()]);
        pairs
            .filter(|logits| logits.iter().all(|&z| z >= f32::MIN))
            .map(|logits| D::far_term(logits, shifts, self.inverse_temperature))
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

    /// The teacher's margin at `target`, from the state of its row.
    pub fn margin_of(&self, state: &RowState, row: Elements, target: usize) -> f64 {
        let target = row.get(target).into();
        let (shift, sum) = (state.shifts[TEACHER], state.sums.teacher);
        math::margin(shift, sum, target, self.inverse_temperature)
    }

    /// The sums of a row. The exponentials stay in `scratch`.
    pub fn state<D: Divergence>(
        &self,
        teacher: Elements,
        student: Elements,
        target: usize,
        scratch: &mut Scratch,
    ) -> RowState {
        const { assert!(D::SWEEPS == 1, "a second sweep needs the state of the first") };
        let mut state = RowState::empty();
        let whole_row = scratch.kept.len() == teacher.len();
        scratch.runs.clear();
        let mut wide_teacher = std::mem::take(&mut scratch.wide_teacher);
        let mut wide_student = std::mem::take(&mut scratch.wide_student);
        let mut before = None;
        for range in tiles(teacher.len(), target, self.tile) {
            let prefetch = [prefetch_after(teacher, &range), prefetch_after(student, &range)];
            let logits = (teacher.slice(range.clone()), student.slice(range.clone()));
            let place = if whole_row { range.clone() } else { 0..range.len() };
            let out = scratch.exponentials(place);
            let (sums, tile_shifts) = match logits {
                (Elements::F16(a), Elements::F16(b)) => {
                    self.sums::<_, D>([a, b], before, out, prefetch)
                }
                (Elements::Bf16(a), Elements::Bf16(b)) => {
                    self.sums::<_, D>([a, b], before, out, prefetch)
                }
                (a, b) => {
                    let wide = [widen(a, &mut wide_teacher), widen(b, &mut wide_student)];
                    self.sums::<_, D>(wide, before, out, prefetch)
                }
            };
            before = Some(tile_shifts);
            let shifts = tile_shifts.map(|shift| shift.value);
            state.rescale::<D>(shifts.map(f64::from), self.inverse_temperature);
            state.sums += sums;
            match scratch.runs.last_mut() {
                Some((run, run_shifts)) if run.end == range.start && *run_shifts == shifts => {
                    run.end = range.end;
                }
                _ => scratch.runs.push((range, shifts)),
            }
        }
        if !self.at_1 {
            state.sums.student_at_1 = state.sums.student;
        }
        (scratch.wide_teacher, scratch.wide_student) = (wide_teacher, wide_student);
        state
    }

    /// Writes the gradient of the row whose exponentials `state` has left in `scratch`.
    pub fn gradient<D: Divergence>(
        &self,
        state: &RowState,
        scales: &GradientScales,
        target: usize,
        scratch: &mut Scratch,
        mut to: Destination,
    ) {
        let runs = std::mem::take(&mut scratch.runs);
        for &(ref range, shifts) in &runs {
            let moved = [TEACHER, STUDENT].map(|m| f64::from(shifts[m]) - state.shifts[m]);
            let factors = moved.map(|moved| (moved * self.inverse_temperature).exp());
            let [divergence, student] =
                D::rescaled_coefficients([scales.divergence, scales.student], moved, factors);
            let scales = Scales {
                divergence: divergence as f32,
                student: student as f32,
                student_at_1: (scales.student_at_1 * moved[STUDENT].exp()) as f32,
            };
            let from = scratch.exponentials(range.clone());
            let (on, non_temporal) = (self.instructions, to.non_temporal);
            match to.row.slice(range.clone()) {
                ElementsMut::F32(out) => {
                    on.write_gradient::<_, D>(&from, scales, out, non_temporal)
                }
                ElementsMut::F16(out) => {
                    on.write_gradient::<_, D>(&from, scales, out, non_temporal)
                }
                ElementsMut::Bf16(out) => {
                    on.write_gradient::<_, D>(&from, scales, out, non_temporal)
                }
            }
        }
        scratch.runs = runs;
        to.row.set(target, scales.target as f32);
        if to.non_temporal {
            fence();
        }
    }
}
