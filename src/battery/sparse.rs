//! Sparse teachers: every case of the battery once more, with the likeliest tokens of its teacher instead of all logits.

use std::collections::BTreeMap;

use super::case::{Case, Tensor, random};
use super::compare::Worst;
use super::divergences::DIVERGENCES;
use super::paper::{differences, textbook_tails};
use super::{Bounds, Check, GROUPS, SEEDS, caught, differentiated};
use crate::reference::{Softmax, defined};
use crate::{
    Batch, Divergence, Dtype, Logits, LogitsMut, Objective, Output, Result, SparseTeacher, Tail,
    Target,
};

/// The part of a case's teacher that is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    pub top_k: usize,
    pub tail: Tail,
    pub dtype: Dtype,
    /// The indices have 32 bits.
    pub narrow: bool,
}

/// The teacher of a case, as a sparse one has it.
pub(super) struct Values {
    kept: Kept,
    narrow: Vec<i32>,
    wide: Vec<i64>,
    log_probs: Tensor,
    target_log_probs: Vec<f32>,
}

impl Values {
    /// The likeliest tokens of each row by its log-probabilities at the token's temperature. Ignored tokens have values that
    /// no other may have. Rows that are no distribution have no index. By tail sampled they are taken for draws: of the tokens
    /// but the label, with the probabilities as weights, one of which each row needs.
    pub fn of(case: &Case, kept: Kept) -> Self {
        let (mut indices, mut log_probs) = (Vec::new(), Vec::new());
        let mut target_log_probs = Vec::new();
        let is_sampled = kept.tail == Tail::Sampled;
        for (token, row) in case.teacher.chunks(case.vocab).enumerate() {
            let label = case.labels.get(token).copied().unwrap_or(0);
            if label == case.objective.ignore_index() {
                indices.extend([-7].repeat(kept.top_k));
                log_probs.extend([f32::NAN].repeat(kept.top_k));
                target_log_probs.push(7.0);
                continue;
            }
            let temperature = case
                .temperatures
                .as_ref()
                .map_or(case.objective.temperature(), |own| own[token].into());
            let row = Tensor::new(case.teacher_dtype, row.iter().copied());
            let row: Vec<f64> = (0..case.vocab).map(|j| row.elements().get(j).into()).collect();
            if !defined(&row) {
                indices.extend([-1].repeat(kept.top_k));
                log_probs.extend([f32::NAN].repeat(kept.top_k));
                target_log_probs.push(-1.0);
                if is_sampled && case.vocab > 1 {
                    let first = indices.len() - kept.top_k;
                    indices[first] = (label + 1) % case.vocab as i64;
                    log_probs[first] = 3.0;
                }
                continue;
            }
            let log = Softmax::new(row, temperature).log;
            let mut order: Vec<usize> = (0..case.vocab).collect();
            order.sort_by(|&i, &j| log[j].total_cmp(&log[i]));
            if is_sampled {
                order.retain(|&column| column != label as usize);
            }
            for place in 0..kept.top_k {
                // Two places are empty, but for rows that would be left without any.
                let empty = kept.top_k > 4 && [1, kept.top_k - 1].contains(&place);
                let column = order.get(place).filter(|_| !empty);
                indices.push(column.map_or(-1, |&column| column as i64));
                log_probs.push(column.map_or(f32::NAN, |&column| log[column] as f32));
            }
            target_log_probs.push(log[label as usize] as f32);
        }
        let narrow = indices.iter().map(|&index| index as i32).collect();
        let log_probs = Tensor::new(kept.dtype, log_probs.into_iter());
        Self { kept, narrow, wide: indices, log_probs, target_log_probs }
    }

    /// The tokens of a row that are known by index, with their probabilities.
    pub fn entries(&self, token: usize) -> BTreeMap<usize, f64> {
        let of_row = token * self.kept.top_k..(token + 1) * self.kept.top_k;
        let known = of_row.filter(|&at| self.wide[at] >= 0);
        let probability = |at| f64::from(self.log_probs.elements().get(at)).exp();
        known.map(|at| (self.wide[at] as usize, probability(at))).collect()
    }

    /// The probability of a row's target.
    pub fn target_probability(&self, token: usize) -> f64 {
        f64::from(self.target_log_probs[token]).exp()
    }

    pub fn teacher(&self, tokens: usize, vocab: usize) -> Result<SparseTeacher<'_>> {
        let (log_probs, top_k) = (self.log_probs.elements(), self.kept.top_k);
        let teacher = match self.kept.narrow {
            true => SparseTeacher::new(&self.narrow, log_probs, tokens, top_k, vocab),
            false => SparseTeacher::new(&self.wide, log_probs, tokens, top_k, vocab),
        };
        Ok(teacher?.with_target_log_probs(&self.target_log_probs)?.with_tail(self.kept.tail))
    }
}

/// Runs every case of [`run`](super::run) on a backend with a sparse teacher: the tails, dtypes and numbers of known tokens
/// in turn. Those of a tail that the objective is infinite by, or refuses, have another.
pub fn run(
    bounds: Bounds,
    backend: impl Fn(&Objective, &Batch, Logits, LogitsMut) -> Result<Output>,
    mut report: impl FnMut(&Check),
) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut add = |group, case: String, worst: Worst| {
        let check = Check { group, case, worst: worst.ratio, detail: worst.detail };
        report(&check);
        checks.push(check);
    };
    let kept = |tail, top_k| Kept { top_k, tail, dtype: Dtype::F32, narrow: true };
    for (name, objective, tail) in differentiated_by_tail() {
        let mut case = random(4, 7, 31).with(Ok(objective));
        case.sparse = Some(kept(tail, 3));
        let worst = caught(differences(&case));
        add("reference: finite differences", format!("{name}, tail {tail:?}"), worst);
    }
    for seed in 0..SEEDS {
        let case = random(3, 23, seed);
        for (name, divergence, tail) in divergences_by_tail() {
            for top_k in TOP_K {
                let worst = caught(textbook_tails(&case, divergence, kept(tail, top_k)));
                let name = format!("{name}, tail {tail:?}, K = {top_k}, seed {seed}");
                add("reference: textbook terms", name, worst);
            }
        }
    }
    let mut turn = 0;
    for (group, cases) in GROUPS {
        for mut case in cases() {
            let mut tail = TAILS[turn % 4];
            if !is_defined(&case.objective, tail) {
                tail = Tail::Bucket;
            }
            let top_k = [64, 1, case.vocab, 2, 7, 1024][turn / 4 % 6];
            let kept = Kept {
                top_k: top_k.min(case.vocab + 2).min(SparseTeacher::MAX_TOP_K),
                tail,
                dtype: [Dtype::F32, Dtype::F16, Dtype::F32, Dtype::Bf16][turn / 7 % 4],
                narrow: turn % 2 == 0,
            };
            turn += 1;
            case.name = format!("{}, {kept:?}", case.name);
            case.sparse = Some(kept);
            let worst = case.run(bounds, &backend);
            add(group, case.name, worst);
        }
    }
    checks
}

/// Cases that [`run`] goes through, for a progress bar.
pub fn len() -> usize {
    differentiated_by_tail().len()
        + SEEDS as usize * divergences_by_tail().len() * TOP_K.len()
        + GROUPS.iter().map(|(_, cases)| cases().len()).sum::<usize>()
}

/// Every objective whose gradient is compared with finite differences, by each tail that is defined with it.
fn differentiated_by_tail() -> Vec<(String, Objective, Tail)> {
    let mut found = Vec::new();
    for (name, objective) in differentiated() {
        let Ok(objective) = objective.map(|o| o.with_target(Target::Label)) else { continue };
        let tails = TAILS.into_iter().filter(|&tail| is_defined(&objective, tail));
        found.extend(tails.map(|tail| (name.clone(), objective, tail)));
    }
    found
}

/// Every divergence over the whole vocabulary, by each tail that is defined with it.
fn divergences_by_tail() -> Vec<(&'static str, Divergence, Tail)> {
    let mut found = Vec::new();
    for (name, divergence) in DIVERGENCES {
        let objective = Objective::plain().with_divergence(divergence);
        let defined =
            |tail| objective.as_ref().map_or(true, |objective| is_defined(objective, tail));
        let tails = TAILS.into_iter().filter(|&tail| defined(tail));
        found.extend(tails.map(|tail| (name, divergence, tail)));
    }
    found
}

fn is_defined(objective: &Objective, tail: Tail) -> bool {
    match tail {
        Tail::Zero => !objective.is_infinite_by_zero_tail(),
        Tail::Sampled => objective.takes_draws() && objective.target() == Target::Label,
        Tail::Uniform | Tail::Bucket => true,
    }
}

/// The numbers of known tokens of 23 by which textbook terms are compared.
const TOP_K: [usize; 4] = [1, 5, 22, 23];

const TAILS: [Tail; 4] = [Tail::Bucket, Tail::Zero, Tail::Uniform, Tail::Sampled];
