//! One row at a time: the state in a first pass, the gradient from cached exponentials in a second.

use std::ops::Range;
use std::sync::Mutex;

use half::slice::HalfFloatSliceExt;

use super::block::{Exponent, Exponentials, Frame, Instructions, Scales};
use crate::logits::{Elements, ElementsMut};
use crate::objective::Objective;
use crate::row::{self, GradientScales, RowState};

/// Logits in a block: small enough that two models' blocks stay in the first-level cache, large
/// enough that the work between blocks does not count.
const BLOCK: usize = 2048;

/// The blocks of a row; the target belongs to none.
fn blocks(vocab: usize, target: usize) -> impl Iterator<Item = Range<usize>> {
    let cut = |from: usize, to: usize| {
        (from..to).step_by(BLOCK).map(move |start| start..to.min(start + BLOCK))
    };
    cut(0, target).chain(cut(target + 1, vocab))
}

/// Where a row's gradient goes.
pub struct Destination<'a> {
    pub row: ElementsMut<'a>,
    /// Its lines are in the cache already, since the row's logits were read from there.
    pub cached: bool,
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

    /// The elements as float32: themselves, or converted into `buffer`.
    fn widen<'a>(&self, elements: Elements<'a>, buffer: &'a mut [f32]) -> &'a [f32] {
        let buffer = &mut buffer[..elements.len()];
        match elements {
            Elements::F32(slice) => return slice,
            Elements::F16(slice) => slice.convert_to_f32_slice(buffer),
            Elements::Bf16(slice) => self.instructions.widen_bf16(slice, buffer),
        }
        buffer
    }

    /// The index of the largest logit, the lowest among equals, 0 if there is nothing but NaN and -inf.
    pub fn arg_max(&self, row: Elements, scratch: &mut Scratch) -> usize {
        let mut best = (f32::NEG_INFINITY, 0);
        for start in (0..row.len()).step_by(BLOCK) {
            let range = start..row.len().min(start + BLOCK);
            let logits = self.widen(row.slice(range), &mut scratch.wide_teacher);
            let (_, max) = self.instructions.min_max(logits);
            if max > best.0 {
                let offset = logits.iter().position(|&z| z == max).expect("the maximum is there");
                best = (max, start + offset);
            }
        }
        best.1
    }

    /// The largest logit and whether exponentials relative to it need care.
    fn frame_of(&self, logits: &[f32], running_max: f64) -> (f32, bool) {
        let (low, high) = self.instructions.min_max(logits);
        let max = high.max(running_max as f32);
        let shallow = |exponent: Exponent| !exponent.underflows(low - max);
        let careful = !(shallow(self.exponent)
            && (!self.at_1 || shallow(Exponent::new(1.0)))
            && high.is_finite()
            && low.is_finite());
        (max, careful)
    }

    /// The teacher's margin at `target`, from its logits alone.
    pub fn margin(&self, row: Elements, target: usize, scratch: &mut Scratch) -> f64 {
        let mut state = RowState::EMPTY;
        for range in blocks(row.len(), target) {
            let logits = self.widen(row.slice(range), &mut scratch.wide_teacher);
            let (max, careful) = self.frame_of(logits, state.teacher_max);
            state.rebase(max.into(), state.student_max, self.inverse_temperature);
            let sum = self.instructions.sum_exp(logits, max, self.exponent, careful);
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
        for range in blocks(teacher.len(), target) {
            let a = self.widen(teacher.slice(range.clone()), &mut wide_teacher);
            let b = self.widen(student.slice(range.clone()), &mut wide_student);
            let (teacher_max, teacher_careful) = self.frame_of(a, state.teacher_max);
            let (student_max, student_careful) = self.frame_of(b, state.student_max);
            state.rebase(teacher_max.into(), student_max.into(), self.inverse_temperature);
            let frame = Frame {
                teacher_max,
                student_max,
                exponent: self.exponent,
                careful: teacher_careful || student_careful,
            };
            let kept = if keep { range } else { 0..range.len() };
            let out = scratch.exponentials(kept, self.at_1);
            let sums = self.instructions.accumulate(a, b, &frame, out);
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
            let buffer = &mut buffer[..range.len()];
            match to.row.slice(range) {
                ElementsMut::F32(out) if to.cached => {
                    self.instructions.combine(&from, scales, out);
                }
                ElementsMut::F32(out) => {
                    self.instructions.combine(&from, scales, buffer);
                    stream(buffer, out);
                }
                ElementsMut::F16(out) => {
                    self.instructions.combine(&from, scales, buffer);
                    out.convert_from_f32_slice(buffer);
                }
                ElementsMut::Bf16(out) => {
                    self.instructions.combine(&from, scales, buffer);
                    self.instructions.narrow_bf16(buffer, out);
                }
            }
        }
        to.row.set(target, scales.target as f32);
        scratch.wide_teacher = buffer;
    }
}

/// Copies past the cache, so that no line is read only to be overwritten.
fn stream(from: &[f32], to: &mut [f32]) {
    to.copy_from_slice(from);
}
