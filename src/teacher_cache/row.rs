//! One row: what a teacher says of a token, to and from its bytes.

use half::f16;

use super::{
    COLUMNS, Encoding, INDICES, LABELS, LOG_PROB_RANGE, LOG_PROBS, Settings, TAIL_MASS,
    TARGET_LOG_PROB,
};
use crate::Dtype;
use crate::sparse::tolerance;

/// A mass this near to 1 is left as it is: dividing by it would cost the accuracy of probabilities near 1, whose
/// logarithm float32 holds far more exactly than the mass.
const LEFT_ALONE: f64 = 2e-6;
/// A stored mass may be this far from 1: what is left alone, and float32's rounding of target and tail.
const STORED: f64 = 3e-6;
/// An entry less probable than this is stored as one that is not there: float16 does not hold it, and its probability
/// is 0 in float64.
const LEAST: f32 = -65504.0;
/// The last code of the encoding `u8`.
const CODES: f32 = 255.0;

/// A row as it is pushed.
pub(super) struct NewRow<'a> {
    pub indices: &'a [i32],
    pub log_probs: &'a [f32],
    pub target_log_prob: f32,
    pub tail_mass: Option<f32>,
    pub label: i64,
    pub rounding: Dtype,
}

/// A row by its settings.
pub(super) struct Codec {
    pub vocab: usize,
    pub top_k: usize,
    encoding: Encoding,
    bits: u32,
    /// Memory for encoding a row, kept from row to row.
    entries: Vec<(f32, i32)>,
    sorted: Vec<i32>,
    /// The row as it will be read.
    read_indices: Vec<i32>,
    read_log_probs: Vec<f32>,
}

impl Codec {
    pub fn new(settings: &Settings) -> Self {
        let Settings { vocab_size: vocab, top_k, encoding, .. } = *settings;
        Self {
            vocab,
            top_k,
            encoding,
            bits: settings.bits_per_index(),
            entries: Vec::with_capacity(top_k),
            sorted: Vec::with_capacity(top_k),
            read_indices: vec![0; top_k],
            read_log_probs: vec![0.0; top_k],
        }
    }

    /// Appends a row to the columns. Returns the most by which an entry will be off when it is read, in nats.
    ///
    /// # Errors
    /// If the row is none that a teacher can have; the columns are then as they were.
    pub fn encode(
        &mut self,
        row: &NewRow,
        columns: &mut [Vec<u8>; COLUMNS],
    ) -> Result<f32, String> {
        let label =
            i32::try_from(row.label).ok().filter(|&label| (label as i64) < self.vocab as i64);
        let Some(label) = label else {
            return Err(format!(
                "its label is {}, but must be below the vocabulary size {}, or negative for a token to be ignored",
                row.label, self.vocab
            ));
        };
        let (target, tail) = match self.distribution(row, label) {
            Ok(masses) => masses,
            Err(_) if label < 0 => {
                self.entries.clear();
                (f32::NEG_INFINITY, 1.0)
            }
            Err(problem) => return Err(problem),
        };
        let starts = columns.each_ref().map(Vec::len);
        columns[TARGET_LOG_PROB].extend(target.to_le_bytes());
        columns[TAIL_MASS].extend(tail.to_le_bytes());
        columns[LABELS].extend(label.to_le_bytes());
        self.put_log_probs(columns);
        self.put_indices(&mut columns[INDICES]);

        let bytes = std::array::from_fn(|i| &columns[i][starts[i]..]);
        let (mut indices, mut log_probs) =
            (std::mem::take(&mut self.read_indices), std::mem::take(&mut self.read_log_probs));
        let read = self.decode(bytes, &mut indices, &mut log_probs);
        let errors =
            self.entries.iter().zip(&log_probs).map(|(&(given, _), &read)| (given - read).abs());
        let largest = errors.fold(0.0, f32::max);
        (self.read_indices, self.read_log_probs) = (indices, log_probs);
        if let Err(problem) = read {
            columns.iter_mut().zip(starts).for_each(|(column, start)| column.truncate(start));
            return Err(format!("its row cannot be stored: {problem}"));
        }
        Ok(largest)
    }

    /// Fills `entries`, the most probable first. Returns the target's log-probability and the tail's mass.
    fn distribution(&mut self, row: &NewRow, label: i32) -> Result<(f32, f32), String> {
        let allowed = tolerance(row.rounding);
        self.entries.clear();
        self.sorted.clear();
        for (&index, &log_prob) in row.indices.iter().zip(row.log_probs) {
            if index == -1 {
                continue;
            }
            if index < 0 || index as usize >= self.vocab {
                return Err(format!(
                    "an index is {index}, but must be below the vocabulary size {}, or -1 for none",
                    self.vocab
                ));
            }
            self.sorted.push(index);
            let what = format_args!("the log-probability of {index}");
            let log_prob = log_probability(log_prob, allowed, &what)?;
            if log_prob >= LEAST {
                self.entries.push((log_prob, index));
            }
        }
        self.sorted.sort_unstable();
        if let Some(twice) = self.sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("the index {} is there twice", twice[0]));
        }
        let mut target = f32::NEG_INFINITY;
        if label >= 0 {
            let what = "the target's log-probability";
            target = log_probability(row.target_log_prob, allowed, &what)?;
            // Labels that are shifted against the rows are found here.
            if let Some(&(entry, _)) = self.entries.iter().find(|entry| entry.1 == label) {
                let apart = (entry - target).abs();
                if apart > 0.01 * target.abs().max(1.0) {
                    return Err(format!(
                        "the target's log-probability is {target}, but {entry} in the entry of its label {label}"
                    ));
                }
            }
        }
        let of_target = f64::from(target).exp();
        let others = self.entries.iter().filter(|entry| entry.1 != label);
        let known: f64 = others.map(|&(log_prob, _)| f64::from(log_prob).exp()).sum();
        let adds_target = label >= 0 && self.sorted.binary_search(&label).is_err();
        let is_whole = self.sorted.len() + usize::from(adds_target) == self.vocab;
        let of_all = known + of_target;
        if is_whole && (of_all - 1.0).abs() > allowed {
            return Err(format!(
                "its probabilities add up to {of_all:.6}, but they are those of the whole vocabulary of {}, and must add up to 1, but for the {allowed} that rounding allows: give log-probabilities (natural logarithms), not logits",
                self.vocab
            ));
        }
        let tail = match row.tail_mass.map(f64::from) {
            // No token is left that could have what rounding leaves.
            None if is_whole => 0.0,
            Some(tail) if is_whole && (0.0..=allowed).contains(&tail) => 0.0,
            // 1 - p as exactly as the logarithm allows.
            None => (-f64::from(target).exp_m1() - known).max(0.0),
            Some(tail) if (0.0..=1.0 + allowed).contains(&tail) => tail,
            Some(tail) => {
                return Err(format!("the tail's mass is {tail}, but must be from 0 to 1"));
            }
        };
        let mass = of_all + tail;
        if (mass - 1.0).abs() > allowed {
            return Err(format!(
                "its probabilities add up to {mass:.6}: the entries but the target {known:.6}, the target {of_target:.6}, the tail {tail:.6}"
            ));
        }
        self.entries.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        if (mass - 1.0).abs() <= LEFT_ALONE {
            return Ok((target, tail.min(1.0) as f32));
        }
        let shift = mass.ln();
        let normalised = |log_prob: f32| (f64::from(log_prob) - shift).min(0.0) as f32;
        self.entries.iter_mut().for_each(|entry| entry.0 = normalised(entry.0).max(LEAST));
        Ok((normalised(target), (tail / mass) as f32))
    }

    fn put_log_probs(&self, columns: &mut [Vec<u8>; COLUMNS]) {
        let missing = self.top_k - self.entries.len();
        match self.encoding {
            Encoding::F16 => {
                let given = self.entries.iter().map(|entry| f16::from_f32(entry.0));
                for code in given.chain(std::iter::repeat_n(f16::NEG_INFINITY, missing)) {
                    columns[LOG_PROBS].extend(code.to_le_bytes());
                }
            }
            Encoding::U8 => {
                let largest = self.entries.first().map_or(0.0, |entry| entry.0);
                let smallest = self.entries.last().map_or(0.0, |entry| entry.0);
                let span = largest - smallest;
                columns[LOG_PROB_RANGE].extend(largest.to_le_bytes());
                columns[LOG_PROB_RANGE].extend(smallest.to_le_bytes());
                // 0 / 0 of a row of equal entries is code 0.
                let given = self
                    .entries
                    .iter()
                    .map(|entry| (CODES * ((largest - entry.0) / span)).round() as u8);
                columns[LOG_PROBS].extend(given.chain(std::iter::repeat_n(u8::MAX, missing)));
            }
        }
    }

    fn put_indices(&self, column: &mut Vec<u8>) {
        let given = self.entries.iter().map(|entry| entry.1 as u64);
        let missing = self.top_k - self.entries.len();
        let (mut buffer, mut held) = (0_u64, 0);
        for code in given.chain(std::iter::repeat_n(self.vocab as u64, missing)) {
            buffer |= code << held;
            held += self.bits;
            while held >= 8 {
                column.push(buffer as u8);
                buffer >>= 8;
                held -= 8;
            }
        }
        if held > 0 {
            column.push(buffer as u8);
        }
    }

    /// A row from its bytes in each column, into K indices and log-probabilities. Returns the target's log-probability,
    /// the tail's mass and the label.
    ///
    /// # Errors
    /// If no row is encoded so.
    pub fn decode(
        &self,
        bytes: [&[u8]; COLUMNS],
        indices: &mut [i32],
        log_probs: &mut [f32],
    ) -> Result<(f32, f32, i32), String> {
        let target = float(bytes[TARGET_LOG_PROB]);
        let tail = float(bytes[TAIL_MASS]);
        let label = i32::from_le_bytes(four(bytes[LABELS]));
        if label >= 0 && label as usize >= self.vocab {
            return Err(format!("its label is {label}, beyond the vocabulary size {}", self.vocab));
        }
        // Neither comparison holds for NaN.
        if !(target <= 0.0 && (0.0..=1.0).contains(&tail))
            || (label < 0 && target > f32::NEG_INFINITY)
        {
            return Err(format!(
                "the target's log-probability is {target}, the tail's mass {tail}, its label {label}"
            ));
        }
        let entries = self.get_indices(bytes[INDICES], indices)?;
        let most = self.get_log_probs(bytes, entries, log_probs)?;

        let (mut known, mut of_target) = (0.0, None);
        for (i, (&index, &log_prob)) in indices.iter().zip(&log_probs[..entries]).enumerate() {
            if index == label {
                of_target = Some(i);
            } else {
                known += f64::from(log_prob).exp();
            }
        }
        // The mass that the entries but the target's had before they were encoded.
        let before = -f64::from(target).exp_m1() - f64::from(tail);
        if before < known * (-most).exp() - STORED || before > known * most.exp() + STORED {
            return Err(format!(
                "the mass of its entries is {known:.6}, but {before:.6} is what target and tail leave"
            ));
        }
        if known > 0.0 {
            // If target and tail take nearly all, their rounding may be more of what is left than the encoding's.
            let shift = (before.max(0.0) / known).ln().clamp(-most, most);
            for log_prob in &mut log_probs[..entries] {
                *log_prob = (f64::from(*log_prob) + shift).min(0.0) as f32;
            }
        }
        if let Some(i) = of_target {
            log_probs[i] = target;
        }
        Ok((target, tail, label))
    }

    /// Returns how many entries are there.
    fn get_indices(&self, bytes: &[u8], indices: &mut [i32]) -> Result<usize, String> {
        let (mut buffer, mut held, mut next) = (0_u64, 0, bytes.iter());
        let mut entries = 0;
        for (i, index) in indices.iter_mut().enumerate() {
            while held < self.bits {
                buffer |= u64::from(next.next().copied().unwrap_or(0)) << held;
                held += 8;
            }
            let code = buffer & ((1 << self.bits) - 1);
            buffer >>= self.bits;
            held -= self.bits;
            if code > self.vocab as u64 {
                return Err(format!(
                    "an index is {code}, beyond the vocabulary size {}",
                    self.vocab
                ));
            }
            if code == self.vocab as u64 {
                *index = -1;
                continue;
            }
            if entries != i {
                return Err(format!("entry {i} is there, but the one before it is not"));
            }
            *index = code as i32;
            entries += 1;
        }
        if buffer != 0 {
            return Err("the bits after its indices are not 0".into());
        }
        Ok(entries)
    }

    /// Returns the most by which the encoding has moved an entry.
    fn get_log_probs(
        &self,
        bytes: [&[u8]; COLUMNS],
        entries: usize,
        log_probs: &mut [f32],
    ) -> Result<f64, String> {
        let most = match self.encoding {
            Encoding::F16 => {
                let codes = bytes[LOG_PROBS].chunks_exact(2);
                for (log_prob, code) in log_probs.iter_mut().zip(codes) {
                    *log_prob = f16::from_le_bytes([code[0], code[1]]).to_f32();
                }
                let smallest = log_probs[..entries].last().map_or(0.0, |&least| f64::from(-least));
                smallest / 2048.0 + 3e-8
            }
            Encoding::U8 => {
                let (first, second) = bytes[LOG_PROB_RANGE].split_at(4);
                let (largest, smallest) = (float(first), float(second));
                if !(LEAST <= smallest && smallest <= largest && largest <= 0.0) {
                    return Err(format!("its log-probabilities are from {smallest} to {largest}"));
                }
                let span = largest - smallest;
                for (i, (log_prob, &code)) in log_probs.iter_mut().zip(bytes[LOG_PROBS]).enumerate()
                {
                    let there = i < entries;
                    if !there && code != u8::MAX {
                        return Err(format!("entry {i} is not there, but has the code {code}"));
                    }
                    let below = span * (f32::from(code) / CODES);
                    *log_prob = match there {
                        // The subtraction's rounding may pass the smallest.
                        true => (largest - below).max(smallest),
                        false => f32::NEG_INFINITY,
                    };
                }
                f64::from(span) / 510.0 + 3e-8
            }
        };
        let (there, not) = log_probs.split_at(entries);
        if let Some(wrong) = not.iter().find(|&&log_prob| log_prob != f32::NEG_INFINITY) {
            return Err(format!("an entry that is not there has the log-probability {wrong}"));
        }
        let mut previous = 0.0;
        for &log_prob in there {
            // Neither holds for NaN.
            if !(LEAST <= log_prob && log_prob <= previous) {
                return Err(format!(
                    "a log-probability is {log_prob} after {previous}, but they must fall and be at least {LEAST}"
                ));
            }
            previous = log_prob;
        }
        // The rounding of the formulas themselves.
        Ok(1.001 * most + 1e-7)
    }
}

/// A log-probability without the rounding that put it above 0, which is as large as is allowed at most.
fn log_probability(value: f32, allowed: f64, what: &dyn std::fmt::Display) -> Result<f32, String> {
    if value.is_nan() || f64::from(value) > allowed {
        return Err(format!("{what} is {value}, but must be at most 0"));
    }
    // 0, not -0.
    Ok(value.min(0.0) + 0.0)
}

fn four(bytes: &[u8]) -> [u8; 4] {
    std::array::from_fn(|i| bytes.get(i).copied().unwrap_or(0))
}

fn float(bytes: &[u8]) -> f32 {
    f32::from_le_bytes(four(bytes))
}
