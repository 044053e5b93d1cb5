//! One row at a time: the state in a first pass, the gradient from cached exponentials in a second.

use std::ops::Range;
use std::sync::Mutex;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::block::{
    Ahead, Exponent, Exponentials, Extent, Instructions, Logit, Reference, Scales, Sums,
};
use crate::logits::{Elements, ElementsMut};
use crate::objective::Objective;
use crate::row::{self, GradientScales, RowState};

/// Logits in a block: small enough that two models' blocks stay in the first-level cache, large
/// enough that the work between blocks does not count.
const BLOCK: usize = 2048;

/// Logits at the start of a row whose largest is the first guess of the row's.
const GUESS: usize = 256;

/// How far a logit over the temperature may exceed what exponentials are relative to. The sums lose
/// no digits to it, and most blocks need no second try.
const HEADROOM: f64 = 2.0;

/// The blocks of a row; the target belongs to none.
fn blocks(vocab: usize, target: usize) -> impl Iterator<Item = Range<usize>> {
    let cut = |from: usize, to: usize| {
        (from..to).step_by(BLOCK).map(move |start| start..to.min(start + BLOCK))
    };
    cut(0, target).chain(cut(target + 1, vocab))
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
    /// Write past the cache: the row's lines are not in it, and will not be read from it soon.
    pub streamed: bool,
}

/// A thread's own memory, reused from row to row.
pub struct Scratch {
    /// Exponentials at the index of their logit: a whole row for a gradient, else only one block.
    teacher: Vec<f32>,
    student: Vec<f32>,
    student_at_1: Vec<f32>,
    /// What the exponentials of each block are relative to.
    maxima: Vec<(f32, f32)>,
    wide_teacher: Vec<f32>,
    wide_student: Vec<f32>,
    half: Vec<u16>,
}

impl Scratch {
    fn exponentials(&mut self, range: Range<usize>, at_1: bool) -> Exponentials<'_> {
        Exponentials {
            teacher: &mut self.teacher[range.clone()],
            student: &mut self.student[range.clone()],
            student_at_1: if at_1 { &mut self.student_at_1[range] } else { &mut [] },
        }
    }
}

/// One [`Scratch`] for each thread of the pool that the call runs on.
pub struct Scratches(Vec<Mutex<Scratch>>);

impl Scratches {
    pub fn new(pass: &RowPass, vocab: usize, with_gradient: bool) -> Self {
        let kept = if with_gradient { vocab } else { BLOCK.min(vocab) };
        let scratch = || Scratch {
            teacher: vec![0.0; kept],
            student: vec![0.0; kept],
            student_at_1: vec![0.0; if pass.at_1 { kept } else { 0 }],
            maxima: Vec::with_capacity(vocab / BLOCK + 2),
            wide_teacher: vec![0.0; BLOCK],
            wide_student: vec![0.0; BLOCK],
            half: vec![0; BLOCK],
        };
        Self((0..rayon::current_num_threads()).map(|_| Mutex::new(scratch())).collect())
    }

    /// Runs `work` with the scratch of the current thread, which no other thread asks for.
    pub fn with<T>(&self, work: impl FnOnce(&mut Scratch) -> T) -> T {
        let thread = rayon::current_thread_index().unwrap_or(0);
        // A poisoned scratch is as good as any: every use overwrites what it reads.
        let mut scratch = self.0[thread].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        work(&mut scratch)
    }
}

/// What is the same for all rows of a call.
pub struct RowPass {
    instructions: Instructions,
    exponent: Exponent,
    inverse_temperature: f64,
    at_1: bool,
}

impl RowPass {
    pub fn new(instructions: Instructions, objective: &Objective) -> Self {
        let inverse_temperature = 1.0 / objective.temperature();
        Self {
            instructions,
            exponent: Exponent::new(inverse_temperature),
            inverse_temperature,
            at_1: objective.ce_weight() != 0.0 && objective.temperature() != 1.0,
        }
    }

    /// The index of the largest logit, the lowest among equals, 0 if there is nothing but NaN and -inf.
    pub fn arg_max(&self, row: Elements, scratch: &mut Scratch) -> usize {
        let mut best = (f32::NEG_INFINITY, 0);
        for start in (0..row.len()).step_by(BLOCK) {
            let range = start..row.len().min(start + BLOCK);
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
    fn guess<L: Logit>(&self, logits: &[L]) -> Reference {
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
    fn sum<L: Logit>(
        &self,
        logits: &[L],
        before: Option<Reference>,
        ahead: Ahead,
    ) -> (f32, Reference) {
        let mut to = before.unwrap_or_else(|| self.guess(logits));
        loop {
            let (sum, extent) = self.instructions.sum_exp(logits, to, self.exponent, ahead);
            match self.adjusted(to, extent) {
                adjusted if adjusted == to => return (sum, to),
                adjusted => to = adjusted,
            }
        }
    }

    /// As [`Self::sum`], for both models.
    fn sums<L: Logit>(
        &self,
        logits: [&[L]; 2],
        before: Option<[Reference; 2]>,
        mut out: Exponentials,
        ahead: [Ahead; 2],
    ) -> (Sums, [Reference; 2]) {
        let mut to = before.unwrap_or_else(|| logits.map(|logits| self.guess(logits)));
        loop {
            let sums = self.instructions.accumulate(logits, to, self.exponent, &mut out, ahead);
            let adjusted = [
                self.adjusted(to[0], sums.teacher_extent),
                self.adjusted(to[1], sums.student_extent),
            ];
            if adjusted == to {
                return (sums, to);
            }
            to = adjusted;
        }
    }

    /// The teacher's margin at `target`, from its logits alone.
    pub fn margin(&self, row: Elements, target: usize, scratch: &mut Scratch) -> f64 {
        let mut state = RowState::EMPTY;
        let mut before = None;
        for range in blocks(row.len(), target) {
            let ahead = ahead(row, &range);
            let (sum, to) = match row.slice(range) {
                Elements::Bf16(logits) => self.sum(logits, before, ahead),
                logits => self.sum(widen(logits, &mut scratch.wide_teacher), before, ahead),
            };
            before = Some(to);
            state.rebase(to.max.into(), state.student_max, self.inverse_temperature);
            state.teacher_sum += f64::from(sum);
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
        scratch.maxima.clear();
        let keep = scratch.teacher.len() == teacher.len();
        let mut wide_teacher = std::mem::take(&mut scratch.wide_teacher);
        let mut wide_student = std::mem::take(&mut scratch.wide_student);
        let mut before = None;
        for range in blocks(teacher.len(), target) {
            let ahead = [ahead(teacher, &range), ahead(student, &range)];
            let logits = (teacher.slice(range.clone()), student.slice(range.clone()));
            let kept = if keep { range } else { 0..range.len() };
            let out = scratch.exponentials(kept, self.at_1);
            let (sums, to) = match logits {
                (Elements::Bf16(a), Elements::Bf16(b)) => self.sums([a, b], before, out, ahead),
                (a, b) => {
                    let wide = [widen(a, &mut wide_teacher), widen(b, &mut wide_student)];
                    self.sums(wide, before, out, ahead)
                }
            };
            before = Some(to);
            let [teacher_max, student_max] = to.map(|to| to.max);
            state.rebase(teacher_max.into(), student_max.into(), self.inverse_temperature);
            state.teacher_sum += f64::from(sums.teacher);
            state.weighted_gap += f64::from(sums.weighted_gap);
            state.student_sum += f64::from(sums.student);
            state.student_sum_at_1 += f64::from(sums.student_at_1);
            state.ruled_out |= sums.ruled_out;
            scratch.maxima.push((teacher_max, student_max));
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
        let vocab = scratch.teacher.len();
        let mut buffer = std::mem::take(&mut scratch.wide_teacher);
        let mut half = std::mem::take(&mut scratch.half);
        for (index, range) in blocks(vocab, target).enumerate() {
            let (teacher_max, student_max) = scratch.maxima[index];
            let teacher = f64::from(teacher_max) - state.teacher_max;
            let student = f64::from(student_max) - state.student_max;
            let scales = Scales {
                teacher: (scales.teacher * (teacher * self.inverse_temperature).exp()) as f32,
                student: (scales.student * (student * self.inverse_temperature).exp()) as f32,
                student_at_1: (scales.student_at_1 * student.exp()) as f32,
            };
            let from = scratch.exponentials(range.clone(), self.at_1);
            let (buffer, half) = (&mut buffer[..range.len()], &mut half[..range.len()]);
            let instructions = self.instructions;
            match to.row.slice(range) {
                ElementsMut::F32(out) => {
                    write(out, buffer, to.streamed, |out| instructions.combine(&from, scales, out))
                }
                ElementsMut::Bf16(out) => {
                    write(out, half.reinterpret_cast_mut(), to.streamed, |out| {
                        instructions.combine(&from, scales, out)
                    })
                }
                ElementsMut::F16(out) => {
                    instructions.combine(&from, scales, buffer);
                    write(out, half.reinterpret_cast_mut(), to.streamed, |out| {
                        out.convert_from_f32_slice(buffer)
                    });
                }
            }
        }
        to.row.set(target, scales.target as f32);
        (scratch.wide_teacher, scratch.half) = (buffer, half);
    }
}

/// Lets `fill` write `to`, or a buffer whose content then goes there past the cache.
fn write<T: Copy>(to: &mut [T], buffer: &mut [T], streamed: bool, fill: impl FnOnce(&mut [T])) {
    if !streamed {
        return fill(to);
    }
    let buffer = &mut buffer[..to.len()];
    fill(buffer);
    stream(buffer, to);
}

/// Copies without reading the lines that it overwrites.
#[cfg(target_arch = "x86_64")]
fn stream<T: Copy>(from: &[T], to: &mut [T]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    const LINE: usize = 64;
    assert_eq!(from.len(), to.len());
    let lines = |to: &[T]| (to.as_ptr().align_offset(LINE), LINE / size_of::<T>());
    let (head, per_line) = lines(to);
    let head = head.min(to.len());
    let tail = (to.len() - head) / per_line * per_line + head;
    to[..head].copy_from_slice(&from[..head]);
    to[tail..].copy_from_slice(&from[tail..]);
    let mut i = head;
    while i < tail {
        // SAFETY: every x86-64 has SSE2; elements i..i + per_line, 64 bytes, are inside both slices,
        // and those of `to` start at a multiple of 64.
        unsafe {
            let (from, to) = (from.as_ptr().add(i), to.as_mut_ptr().add(i));
            for part in 0..4 {
                let value = _mm_loadu_si128(from.cast::<__m128i>().add(part));
                _mm_stream_si128(to.cast::<__m128i>().add(part), value);
            }
        }
        i += per_line;
    }
    // SAFETY: SSE2 again. Only a fence orders such stores before whatever tells another thread of them.
    unsafe { std::arch::x86_64::_mm_sfence() };
}

#[cfg(not(target_arch = "x86_64"))]
fn stream<T: Copy>(from: &[T], to: &mut [T]) {
    to.copy_from_slice(from);
}
