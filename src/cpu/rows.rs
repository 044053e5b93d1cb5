//! One row at a time: the state in a first pass, the gradient from cached exponentials in a second.

use std::ops::{Deref, DerefMut, Range};

use half::slice::HalfFloatSliceExt;

use super::block::{
    Ahead, Element, Exponent, Exponentials, Extent, FAR, Instructions, Reference, Scales, Sums,
};
use super::vector::fence;
use crate::Result;
use crate::logits::{Elements, ElementsMut};
use crate::objective::Objective;
use crate::row::{self, GradientScales, RowState};

/// Vectors in a block: few enough that two models' blocks stay in the first-level cache, and that the errors
/// of float32 sums, which all go one way where logits are equal, stay far below what the loss may be off;
/// enough that the work between blocks does not count.
const VECTORS: usize = 64;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Logits at the start of a row whose largest is the first guess of the row's.
const GUESS: usize = 256;

/// How far a logit over the temperature may exceed what exponentials are relative to. The sums lose
/// no digits to it, and most blocks need no second try.
const HEADROOM: f64 = 2.0;

/// The blocks of a row; the target belongs to none. All but what follows it in its block start where a
/// cache line does if the row does.
fn blocks(vocab: usize, target: usize, block: usize) -> impl Iterator<Item = Range<usize>> {
    (0..vocab).step_by(block).flat_map(move |start| {
        let end = vocab.min(start + block);
        let cut = target.clamp(start, end);
        let behind = if cut == target { cut + 1 } else { cut };
        [start..cut, behind..end].into_iter().filter(|block| !block.is_empty())
    })
}

/// What follows the block in memory: the next block, or the start of the next row.
fn ahead(row: Elements, block: &Range<usize>) -> Ahead {
    let size = row.dtype().size();
    Ahead { address: row.as_ptr().wrapping_add(block.end * size), size }
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

/// Where a row's gradient goes.
pub struct Destination<'a> {
    pub row: ElementsMut<'a>,
    /// Past the cache: the row's lines are not in it, and will not be read from it soon.
    pub past_cache: bool,
}

/// Numbers of which the first starts a cache line.
#[derive(Default)]
struct Lines {
    memory: Vec<f32>,
    start: usize,
}

impl Lines {
    fn new(len: usize) -> Self {
        let mut memory = vec![0.0; len + LINE / size_of::<f32>() - 1];
        let start = memory.as_ptr().align_offset(LINE).min(memory.len() - len);
        memory.truncate(start + len);
        Self { memory, start }
    }
}

impl Deref for Lines {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.memory[self.start..]
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.memory[self.start..]
    }
}

/// A thread's own memory, reused from row to row.
pub struct Scratch {
    /// Exponentials at the index of their logit: a whole row for a gradient, else only one block.
    teacher: Lines,
    student: Lines,
    student_at_1: Lines,
    /// Stretches of the row whose exponentials are relative to the same, teacher's and student's.
    stretches: Vec<(Range<usize>, [f32; 2])>,
    wide_teacher: Lines,
    wide_student: Lines,
}

impl Scratch {
    fn exponentials(&mut self, range: Range<usize>) -> Exponentials<'_> {
        let at_1 = !self.student_at_1.is_empty();
        Exponentials {
            teacher: &mut self.teacher[range.clone()],
            student: &mut self.student[range.clone()],
            student_at_1: if at_1 { &mut self.student_at_1[range] } else { &mut [] },
        }
    }
}

/// What is the same for all rows of a call.
pub struct RowPass {
    instructions: Instructions,
    /// Logits in a block.
    block: usize,
    exponent: Exponent,
    /// As the exponentials have it.
    pub inverse_temperature: f64,
    at_1: bool,
}

impl RowPass {
    /// With the instructions given, or the chosen ones.
    ///
    /// # Errors
    /// As [`Instructions::chosen`].
    pub fn new(instructions: Option<Instructions>, objective: &Objective) -> Result<Self> {
        let instructions = instructions.map_or_else(Instructions::chosen, Ok)?;
        let exponent = Exponent::new(1.0 / objective.temperature());
        Ok(Self {
            instructions,
            block: VECTORS * instructions.lanes(),
            exponent,
            inverse_temperature: exponent.inverse_temperature(),
            at_1: objective.ce_weight() != 0.0 && objective.temperature() != 1.0,
        })
    }

    /// Memory for the rows that a thread does: of a whole row's exponentials if gradients are wanted.
    pub fn scratch(&self, vocab: usize, with_gradient: bool) -> Scratch {
        let kept = if with_gradient { vocab } else { self.block.min(vocab) };
        Scratch {
            teacher: Lines::new(kept),
            student: Lines::new(kept),
            student_at_1: Lines::new(if self.at_1 { kept } else { 0 }),
            stretches: Vec::with_capacity(vocab / self.block + 3),
            wide_teacher: Lines::new(self.block),
            wide_student: Lines::new(self.block),
        }
    }

    /// The index of the largest logit, the lowest among equals, 0 if there is nothing but NaN and -inf.
    pub fn arg_max(&self, row: Elements, scratch: &mut Scratch) -> usize {
        let mut best = (f32::NEG_INFINITY, 0);
        for start in (0..row.len()).step_by(self.block) {
            let range = start..row.len().min(start + self.block);
            let logits = widen(row.slice(range), &mut scratch.wide_teacher);
            let max = self.instructions.extent(logits).high;
            if max > best.0 {
                let offset = logits.iter().position(|&z| z == max).expect("the maximum is there");
                best = (max, start + offset);
            }
        }
        best.1
    }

    /// A first guess, from the start of a row.
    fn guess<L: Element>(&self, logits: &[L]) -> Reference {
        let max = self.instructions.extent(&logits[..logits.len().min(GUESS)]).high;
        Reference { max: max.max(RowState::NO_MAX as f32), careful: false }
    }

    /// What the exponentials of a block of this extent must be relative to, given that those before
    /// it were relative to `to`.
    fn adjusted(&self, to: Reference, extent: Extent) -> Reference {
        let excess = f64::from(extent.high) - f64::from(to.max);
        // At temperature 1 the same distance may be a larger exponent.
        let steepest =
            if self.at_1 { self.inverse_temperature.max(1.0) } else { self.inverse_temperature };
        let max = if excess * steepest > HEADROOM { extent.high } else { to.max };
        let depth = extent.low - max;
        let careful = to.careful
            || !extent.low.is_finite()
            || self.exponent.underflows(depth)
            || (self.at_1 && Exponent::new(1.0).underflows(depth));
        Reference { max, careful }
    }

    /// The sum of a block's exponentials, and what it is relative to, starting from what the block
    /// before it was.
    fn sum<L: Element>(
        &self,
        logits: &[L],
        before: Option<Reference>,
        ahead: Ahead,
    ) -> (f64, Reference) {
        let mut to = before.unwrap_or_else(|| self.guess(logits));
        loop {
            let (sum, tame) = self.instructions.sum_exp(logits, to, self.exponent, ahead);
            if tame {
                return (sum, to);
            }
            match self.adjusted(to, self.instructions.extent(logits)) {
                adjusted if adjusted == to => return (sum, to),
                adjusted => to = adjusted,
            }
        }
    }

    /// As [`Self::sum`], for both models.
    fn sums<L: Element>(
        &self,
        logits: [&[L]; 2],
        before: Option<[Reference; 2]>,
        mut out: Exponentials,
        ahead: [Ahead; 2],
    ) -> (Sums, [Reference; 2]) {
        let mut to = before.unwrap_or_else(|| logits.map(|logits| self.guess(logits)));
        loop {
            let mut sums = self.instructions.accumulate(logits, to, self.exponent, &mut out, ahead);
            // Neither depends on the other's logits: tokens with equal teachers have equal margins.
            let adjusted = [0, 1].map(|model| match sums.tame[model] {
                true => to[model],
                false => self.adjusted(to[model], self.instructions.extent(logits[model])),
            });
            if adjusted == to {
                if sums.far {
                    sums.weighted_gap += self.far_gap(logits, to);
                }
                return (sums, to);
            }
            to = adjusted;
        }
    }

    /// What [`Sums::weighted_gap`] leaves out.
    fn far_gap<L: Element>(&self, [teacher, student]: [&[L]; 2], to: [Reference; 2]) -> f64 {
        let [teacher_max, student_max] = to.map(|to| to.max);
        let pairs = teacher.iter().zip(student).map(|(a, b)| (a.widen(), b.widen()));
        pairs
            .filter(|&(a, b)| a >= f32::MIN && b >= f32::MIN && b - student_max < -FAR)
            .map(|(a, b)| {
                let da = f64::from(a) - f64::from(teacher_max);
                let db = f64::from(b) - f64::from(student_max);
                (da * self.inverse_temperature).exp() * (da - db)
            })
            .sum()
    }

    /// The teacher's margin at `target`, from its logits alone.
    pub fn margin(&self, row: Elements, target: usize) -> f64 {
        let mut state = RowState::EMPTY;
        let mut before = None;
        for range in blocks(row.len(), target, self.block) {
            let ahead = ahead(row, &range);
            let (sum, to) = match row.slice(range) {
                Elements::F32(logits) => self.sum(logits, before, ahead),
                Elements::F16(logits) => self.sum(logits, before, ahead),
                Elements::Bf16(logits) => self.sum(logits, before, ahead),
            };
            before = Some(to);
            state.rebase(to.max.into(), state.student_max, self.inverse_temperature);
            state.teacher_sum += sum;
        }
        self.margin_of(&state, row, target)
    }

    pub fn margin_of(&self, state: &RowState, row: Elements, target: usize) -> f64 {
        let target = row.get(target).into();
        row::margin(state.teacher_max, state.teacher_sum, target, self.inverse_temperature)
    }

    /// Everything that the loss needs to know of a row. The exponentials stay in `scratch`.
    pub fn state(
        &self,
        teacher: Elements,
        student: Elements,
        target: usize,
        scratch: &mut Scratch,
    ) -> RowState {
        let mut state = RowState::EMPTY;
        let keep = scratch.teacher.len() == teacher.len();
        scratch.stretches.clear();
        let mut wide_teacher = std::mem::take(&mut scratch.wide_teacher);
        let mut wide_student = std::mem::take(&mut scratch.wide_student);
        let mut before = None;
        for range in blocks(teacher.len(), target, self.block) {
            let ahead = [ahead(teacher, &range), ahead(student, &range)];
            let logits = (teacher.slice(range.clone()), student.slice(range.clone()));
            let kept = if keep { range.clone() } else { 0..range.len() };
            let out = scratch.exponentials(kept);
            let (sums, to) = match logits {
                (Elements::F16(a), Elements::F16(b)) => self.sums([a, b], before, out, ahead),
                (Elements::Bf16(a), Elements::Bf16(b)) => self.sums([a, b], before, out, ahead),
                (a, b) => {
                    let wide = [widen(a, &mut wide_teacher), widen(b, &mut wide_student)];
                    self.sums(wide, before, out, ahead)
                }
            };
            before = Some(to);
            let [teacher_max, student_max] = to.map(|to| to.max);
            state.rebase(teacher_max.into(), student_max.into(), self.inverse_temperature);
            state.teacher_sum += sums.teacher;
            state.weighted_gap += sums.weighted_gap;
            state.student_sum += sums.student;
            state.student_sum_at_1 += sums.student_at_1;
            state.ruled_out |= sums.ruled_out;
            match scratch.stretches.last_mut() {
                Some((stretch, maxima))
                    if stretch.end == range.start && *maxima == [teacher_max, student_max] =>
                {
                    stretch.end = range.end;
                }
                _ => scratch.stretches.push((range, [teacher_max, student_max])),
            }
        }
        if !self.at_1 {
            state.student_sum_at_1 = state.student_sum;
        }
        (scratch.wide_teacher, scratch.wide_student) = (wide_teacher, wide_student);
        state
    }

    /// The gradient of the row whose exponentials `state` has left in `scratch`.
    pub fn gradient(
        &self,
        state: &RowState,
        scales: &GradientScales,
        target: usize,
        scratch: &mut Scratch,
        mut to: Destination,
    ) {
        let stretches = std::mem::take(&mut scratch.stretches);
        for &(ref range, [teacher_max, student_max]) in &stretches {
            let teacher = f64::from(teacher_max) - state.teacher_max;
            let student = f64::from(student_max) - state.student_max;
            let scales = Scales {
                teacher: (scales.teacher * (teacher * self.inverse_temperature).exp()) as f32,
                student: (scales.student * (student * self.inverse_temperature).exp()) as f32,
                student_at_1: (scales.student_at_1 * student.exp()) as f32,
            };
            let from = scratch.exponentials(range.clone());
            let instructions = self.instructions;
            match to.row.slice(range.clone()) {
                ElementsMut::F32(out) => instructions.combine(&from, scales, out, to.past_cache),
                ElementsMut::F16(out) => instructions.combine(&from, scales, out, to.past_cache),
                ElementsMut::Bf16(out) => instructions.combine(&from, scales, out, to.past_cache),
            }
        }
        scratch.stretches = stretches;
        to.row.set(target, scales.target as f32);
        if to.past_cache {
            fence();
        }
    }
}
