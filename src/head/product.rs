//! The products of a chunk of tokens with a weight, by all threads, each of which multiplies a tile at a time.
//!
//! The tiles are the same whatever the number of threads, and so are the bits of every sum. Each thread widens the tile
//! of a weight in half precision that it multiplies; no other part of the weight exists in float32.

use std::ops::Range;

use gemm::{Parallelism, gemm};
use half::slice::HalfFloatSliceExt;

use crate::Elements;
use crate::cpu::Threads;

/// Rows of a weight in a tile.
const ROWS: usize = 256;
/// Rows, or columns, over which a tile of a weight in half precision is summed up: its float32 copy takes 1 MB.
const DEPTH: usize = 1024;
/// Tokens and features in a tile of the hidden states' gradient.
const TOKENS: usize = 128;
const FEATURES: usize = 128;

/// A weight `[rows, columns]`, contiguous.
#[derive(Clone, Copy)]
pub struct Weight<'a> {
    pub elements: Elements<'a>,
    pub columns: usize,
}

impl<'a> Weight<'a> {
    fn rows(&self) -> usize {
        self.elements.len() / self.columns
    }

    /// Parts of so many columns at most that are multiplied at once: all of a float32 weight, which needs no copy.
    fn parts(&self, columns: Range<usize>) -> Vec<Range<usize>> {
        let part = match self.elements {
            Elements::F32(_) => columns.len().max(1),
            _ => DEPTH,
        };
        ranges(columns, part)
    }

    /// A tile in float32: itself, or its copy in `scratch`.
    fn tile<'s>(
        &'s self,
        rows: Range<usize>,
        columns: Range<usize>,
        scratch: &'s mut Vec<f32>,
    ) -> Matrix<'s> {
        let start = |row: usize| row * self.columns + columns.start;
        let (count, width) = (rows.len(), columns.len());
        if let Elements::F32(elements) = self.elements {
            return Matrix::new(&elements[start(rows.start)..], [count, width], [self.columns, 1]);
        }
        scratch.resize(count * width, 0.0);
        for (row, to) in rows.zip(scratch.chunks_mut(width)) {
            widen(self.elements.slice(start(row)..start(row) + width), to);
        }
        Matrix::new(scratch, [count, width], [width, 1])
    }
}

/// Copies elements, widened.
pub fn widen(from: Elements, to: &mut [f32]) {
    match from {
        Elements::F32(from) => to.copy_from_slice(from),
        Elements::F16(from) => from.convert_to_f32_slice(to),
        Elements::Bf16(from) => from.convert_to_f32_slice(to),
    }
}

fn ranges(of: Range<usize>, length: usize) -> Vec<Range<usize>> {
    let end = of.end;
    of.step_by(length).map(|start| start..(start + length).min(end)).collect()
}

/// A matrix in float32, and the elements between its rows and between its columns.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    elements: &'a [f32],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// Panics if the elements are too few.
    fn new(elements: &'a [f32], shape: [usize; 2], strides: [usize; 2]) -> Self {
        let last = |i: usize| shape[i].saturating_sub(1) * strides[i];
        let span = last(0) + last(1) + 1;
        assert!(shape.contains(&0) || span <= elements.len(), "{shape:?} lies in its elements");
        Self { elements, shape, strides }
    }

    /// Contiguous rows.
    fn contiguous(elements: &'a [f32], columns: usize) -> Self {
        Self::new(elements, [elements.len() / columns, columns], [columns, 1])
    }

    fn transposed(self) -> Self {
        let ([rows, columns], [row, column]) = (self.shape, self.strides);
        Self { shape: [columns, rows], strides: [column, row], ..self }
    }

    fn part(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        let shape = [rows.len(), columns.len()];
        if shape.contains(&0) {
            return Self { shape, ..self };
        }
        let start = rows.start * self.strides[0] + columns.start * self.strides[1];
        Self::new(&self.elements[start..], shape, self.strides)
    }
}

/// A matrix of which threads write parts that are apart.
#[derive(Clone, Copy)]
struct Shared {
    first: *mut f32,
    columns: usize,
}

// SAFETY: a thread writes to a part that is its own.
unsafe impl Send for Shared {}
// SAFETY: likewise.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(elements: &mut [f32], columns: usize) -> Self {
        Self { first: elements.as_mut_ptr(), columns }
    }

    fn at(self, row: usize, column: usize) -> *mut f32 {
        self.first.wrapping_add(row * self.columns + column)
    }
}

/// Writes the product of two matrices, or adds it.
///
/// # Safety
/// `to` is the first of as many rows as `left` has, `stride` elements apart, of as many elements as `right` has columns,
/// which are initialised and nobody else uses.
unsafe fn multiply(to: *mut f32, stride: usize, left: Matrix, right: Matrix, adds: bool) {
    let [rows, depth] = left.shape;
    let [_, columns] = right.shape;
    assert_eq!(depth, right.shape[0], "the factors fit");
    let [left_row, left_column] = left.strides.map(|stride| stride as isize);
    let [right_row, right_column] = right.strides.map(|stride| stride as isize);
    // SAFETY: the factors lie in their elements, and the product where the caller says.
    unsafe {
        gemm(
            rows,
            columns,
            depth,
            to,
            1,
            stride as isize,
            adds,
            left.elements.as_ptr(),
            left_column,
            left_row,
            right.elements.as_ptr(),
            right_column,
            right_row,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        )
    }
}

/// The logits `[tokens, rows]`: `hidden [tokens, columns]` times the transpose of `weight [rows, columns]`, plus the bias.
pub fn logits(
    threads: Threads,
    hidden: &[f32],
    weight: Weight,
    bias: Option<Elements>,
    to: &mut [f32],
) {
    let vocab = weight.rows();
    let hidden = Matrix::contiguous(hidden, weight.columns);
    let [tokens, _] = hidden.shape;
    assert_eq!(to.len(), tokens * vocab);
    let to = Shared::new(to, vocab);
    threads.map(ranges(0..vocab, ROWS), Vec::new, |scratch, rows| {
        if let Some(bias) = bias {
            for token in 0..tokens {
                // SAFETY: these columns are this thread's.
                let to =
                    unsafe { std::slice::from_raw_parts_mut(to.at(token, rows.start), rows.len()) };
                widen(bias.slice(rows.clone()), to);
            }
        }
        for columns in weight.parts(0..weight.columns) {
            let adds = bias.is_some() || columns.start > 0;
            let tile = weight.tile(rows.clone(), columns.clone(), scratch).transposed();
            // SAFETY: these columns are this thread's.
            unsafe {
                multiply(to.at(0, rows.start), vocab, hidden.part(0..tokens, columns), tile, adds)
            }
        }
    });
}

/// The hidden states' gradient `[tokens, columns]`: `gradient [tokens, rows]` of the logits times `weight`.
pub fn hidden_gradient(threads: Threads, gradient: &[f32], weight: Weight, to: &mut [f32]) {
    let (vocab, features) = (weight.rows(), weight.columns);
    let gradient = Matrix::contiguous(gradient, vocab);
    let [tokens, _] = gradient.shape;
    assert_eq!(to.len(), tokens * features);
    let to = Shared::new(to, features);
    // A float32 tile has all rows: the product's own blocks are of fewer.
    let depth = if let Elements::F32(_) = weight.elements { vocab } else { DEPTH };
    let tiles = ranges(0..features, FEATURES).into_iter().flat_map(|columns| {
        ranges(0..tokens, TOKENS).into_iter().map(move |rows| (rows, columns.clone()))
    });
    threads.map(tiles.collect(), Vec::new, |scratch, (tokens, columns)| {
        for rows in ranges(0..vocab, depth) {
            let tile = weight.tile(rows.clone(), columns.clone(), scratch);
            // SAFETY: these rows and columns are this thread's.
            unsafe {
                multiply(
                    to.at(tokens.start, columns.start),
                    features,
                    gradient.part(tokens.clone(), rows.clone()),
                    tile,
                    rows.start > 0,
                )
            }
        }
    });
}

/// Writes the weight's gradient `[rows, columns]`, the transpose of `gradient [tokens, rows]` times `hidden
/// [tokens, columns]`, or adds it.
pub fn weight_gradient(
    threads: Threads,
    gradient: &[f32],
    hidden: &[f32],
    columns: usize,
    to: &mut [f32],
    adds: bool,
) {
    let vocab = to.len() / columns;
    let (gradient, hidden) =
        (Matrix::contiguous(gradient, vocab), Matrix::contiguous(hidden, columns));
    let [tokens, _] = hidden.shape;
    let tiles = to.chunks_mut(ROWS * columns).zip(ranges(0..vocab, ROWS)).collect();
    threads.map(
        tiles,
        || (),
        |_, (to, rows)| {
            let gradient = gradient.part(0..tokens, rows).transposed();
            // SAFETY: `to` has a row of `columns` elements for each of these.
            unsafe { multiply(to.as_mut_ptr(), columns, gradient, hidden, adds) }
        },
    );
}

/// Adds the bias's gradient, the sum of the rows of `gradient [tokens, to.len()]`.
pub fn add_bias_gradient(threads: Threads, gradient: &[f32], to: &mut [f32]) {
    let vocab = to.len();
    let parts = to.chunks_mut(ROWS).zip(ranges(0..vocab, ROWS)).collect();
    threads.map(
        parts,
        || (),
        |_, (to, columns)| {
            for row in gradient.chunks(vocab) {
                to.iter_mut().zip(&row[columns.clone()]).for_each(|(sum, &each)| *sum += each);
            }
        },
    );
}
