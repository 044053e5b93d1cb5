//! The student's row of a sparse teacher: one sweep over the tokens that the teacher does not know, which to the teacher are
//! all alike. Only their sum, and each one's share of it, matter.

use super::{
    Aligned, Destination, Element, HEADROOM, RowPass, RowState, Scales, Scratch, prefetch_after,
};
use crate::cpu::exp::Exponent;
use crate::cpu::math::STUDENT;
use crate::cpu::tile::{Prefetch, Shift};
use crate::cpu::vector::fence;
use crate::logits::Elements;

/// How far below the shift a logit over the temperature is surely in range.
const DEPTH: f64 = 40.0;

/// The sums over the student's logits of the tokens that are left.
#[derive(Clone, Copy, Debug)]
pub struct Rest {
    /// The logit that the sums are relative to, near the largest.
    pub shift: f64,
    /// sum e^{(z_j - shift) / T}
    pub sum: f64,
    /// sum e^{z_j - shift}, if it is wanted apart.
    pub sum_at_1: f64,
}

impl RowPass {
    /// Memory for [`rest`](Self::rest), for the rows that one thread does.
    pub fn rest_scratch(&self, vocab: usize, with_gradient: bool) -> Scratch {
        let kept = if with_gradient { vocab } else { self.tile.min(vocab) };
        Scratch {
            kept: Aligned::default(),
            student: Aligned::new(kept),
            student_at_1: Aligned::new(if self.at_1 { kept } else { 0 }),
            runs: Vec::with_capacity(vocab / self.tile + 1),
            wide_teacher: Aligned::default(),
            wide_student: Aligned::new(self.tile),
        }
    }

    /// The sums over a row without the columns `known`, which ascend. The exponentials stay in `scratch`, with 0 in those
    /// columns.
    pub fn rest(&self, row: Elements, known: &[usize], scratch: &mut Scratch) -> Rest {
        let mut wide = std::mem::take(&mut scratch.wide_student);
        let mut rest = Rest { shift: RowState::NO_SHIFT, sum: 0.0, sum_at_1: 0.0 };
        let whole_row = scratch.student.len() >= row.len();
        scratch.runs.clear();
        let (mut before, mut known) = (None, known);
        for start in (0..row.len()).step_by(self.tile) {
            let range = start..row.len().min(start + self.tile);
            let inside = known.partition_point(|&column| column < range.end);
            let (here, behind) = known.split_at(inside);
            known = behind;
            let place = if whole_row { range.clone() } else { 0..range.len() };
            let student = &mut scratch.student[place.clone()];
            if here.len() == range.len() {
                student.fill(0.0);
                if self.at_1 {
                    scratch.student_at_1[place].fill(0.0);
                }
                scratch.add_run(range, of_student(before.map_or(0.0, |shift: Shift| shift.value)));
                continue;
            }
            let at_1 = if self.at_1 { &mut scratch.student_at_1[place] } else { &mut [] };
            let prefetch = prefetch_after(row, &range);
            let logits = row.slice(range.clone());
            let shift = match logits {
                _ if here.iter().any(|&column| !self.is_in_reach(row.get(column), before)) => {
                    let others = without(logits, start, here, &mut wide);
                    self.exponentials(others, before, student, at_1, prefetch)
                }
                Elements::F32(logits) => self.exponentials(logits, before, student, at_1, prefetch),
                Elements::F16(logits) => self.exponentials(logits, before, student, at_1, prefetch),
                Elements::Bf16(logits) => {
                    self.exponentials(logits, before, student, at_1, prefetch)
                }
            };
            before = Some(shift);
            for &column in here {
                student[column - start] = 0.0;
                if self.at_1 {
                    at_1[column - start] = 0.0;
                }
            }
            let moved = rest.shift - f64::from(shift.value);
            rest.shift = shift.value.into();
            rest.sum *= (moved * self.inverse_temperature).exp();
            rest.sum += self.instructions.sum(student);
            rest.sum_at_1 *= moved.exp();
            rest.sum_at_1 += self.instructions.sum(at_1);
            scratch.add_run(range, of_student(shift.value));
        }
        scratch.wide_student = wide;
        rest
    }

    /// Returns whether a logit of a tile leaves its shift as it is, given that of the tile before.
    fn is_in_reach(&self, logit: f32, before: Option<Shift>) -> bool {
        let steepest =
            if self.at_1 { self.inverse_temperature.max(1.0) } else { self.inverse_temperature };
        before.is_some_and(|shift| {
            let exponent = (f64::from(logit) - f64::from(shift.value)) * steepest;
            (-DEPTH..=HEADROOM).contains(&exponent)
        })
    }

    /// Writes the exponentials of a tile, and returns their shift, given that of the tile before.
    fn exponentials<L: Element>(
        &self,
        logits: &[L],
        before: Option<Shift>,
        out: &mut [f32],
        out_at_1: &mut [f32],
        prefetch: Prefetch,
    ) -> Shift {
        let mut shift = before.unwrap_or_else(|| self.initial_shift(logits));
        loop {
            let mut in_range =
                self.instructions.exponentials(logits, shift, self.exponent, out, prefetch);
            if self.at_1 {
                let exponent = Exponent::new(1.0);
                in_range &=
                    self.instructions.exponentials(logits, shift, exponent, out_at_1, prefetch);
            }
            if in_range {
                return shift;
            }
            match self.adjusted(shift, self.instructions.extent(logits)) {
                adjusted if adjusted == shift => return shift,
                adjusted => shift = adjusted,
            }
        }
    }

    /// Writes the gradient of the columns that [`rest`](Self::rest) has summed up: the first scale times their exponential
    /// at the temperature, and the second times that at temperature 1, both relative to the shift of `rest`. The known
    /// columns become 0.
    pub fn rest_gradient(
        &self,
        rest: &Rest,
        [scale, scale_at_1]: [f64; 2],
        scratch: &mut Scratch,
        to: &mut Destination,
    ) {
        let runs = std::mem::take(&mut scratch.runs);
        for &(ref range, shifts) in &runs {
            let moved = f64::from(shifts[STUDENT]) - rest.shift;
            let scales = Scales {
                divergence: 0.0,
                student: (scale * (moved * self.inverse_temperature).exp()) as f32,
                student_at_1: (scale_at_1 * moved.exp()) as f32,
            };
            self.write_run(&scratch.exponentials(range.clone()), scales, range.clone(), to);
        }
        scratch.runs = runs;
        if to.non_temporal {
            // Later stores overwrite some of it.
            fence();
        }
    }
}

/// The shifts of a run of the student alone.
fn of_student(shift: f32) -> [f32; 3] {
    [0.0, shift, 0.0]
}

/// The logits of a tile from column `start` on, with those of the columns `known` replaced by that of another one, so that
/// they have no say in the tile's extent. There is another one.
fn without<'a>(
    logits: Elements,
    start: usize,
    known: &[usize],
    buffer: &'a mut [f32],
) -> &'a [f32] {
    let buffer = &mut buffer[..logits.len()];
    match logits {
        Elements::F32(logits) => buffer.copy_from_slice(logits),
        half => {
            super::widen(half, buffer);
        }
    }
    let other = known.iter().zip(start..).position(|(&column, place)| column != place);
    let value = buffer[other.unwrap_or(known.len())];
    for column in known {
        buffer[column - start] = value;
    }
    buffer
}
