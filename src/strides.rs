//! The places of a matrix's rows, and a test that those of two matrices lie apart.

/// The starts of the rows of logits, or of a gradient, `[tokens, vocab]`, in elements from the first.
///
/// All rows are evenly spaced: a row stride, which a `usize` becomes by `into()`. Or they are the rows of a
/// tensor `[outer, inner, vocab]` with a stride for each of both dimensions, such as `logits[:, :-1]` of
/// logits `[batch, time, vocab]`: row `i` starts `(i / inner) * outer_stride + (i % inner) * row_stride`
/// elements after the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Strides {
    row: usize,
    /// `usize::MAX` where all rows are evenly spaced.
    inner: usize,
    outer: usize,
}

impl From<usize> for Strides {
    fn from(row_stride: usize) -> Self {
        Self { row: row_stride, inner: usize::MAX, outer: 0 }
    }
}

impl std::fmt::Display for Strides {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "row stride {}", self.row)?;
        if self.inner != usize::MAX {
            write!(f, " within {} rows, outer stride {}", self.inner, self.outer)?;
        }
        Ok(())
    }
}

impl Strides {
    /// The rows of a tensor `[outer, inner, vocab]`: `row_stride` elements apart in the inner dimension,
    /// `outer_stride` in the outer one. Neither has to be the larger one. The number of rows must be a
    /// multiple of `inner`.
    pub fn nested(inner: usize, outer_stride: usize, row_stride: usize) -> Self {
        if inner == 1 {
            outer_stride.into()
        } else if inner.checked_mul(row_stride) == Some(outer_stride) {
            row_stride.into()
        } else {
            Self { row: row_stride, inner, outer: outer_stride }
        }
    }

    /// The rows of a tensor `[.., vocab]` of this shape and these strides, both in elements and as long as each other: if the
    /// last dimension is contiguous, the rows lie apart, and at most two strides lead to them. `None` where a copy is needed.
    ///
    /// ```
    /// use atkd::Strides;
    ///
    /// // `[:, :-1]` of logits [2, 3, 8].
    /// assert_eq!(Strides::of_tensor(&[2, 2, 8], &[24, 8, 1]), Some(Strides::nested(2, 24, 8)));
    /// // Their transpose.
    /// assert_eq!(Strides::of_tensor(&[2, 8, 3], &[24, 1, 8]), None);
    /// ```
    pub fn of_tensor(shape: &[usize], strides: &[usize]) -> Option<Self> {
        let (&vocab, leading) = shape.split_last()?;
        let (&step, strides) = strides.split_last()?;
        if leading.len() != strides.len() || (vocab > 1 && step != 1) {
            return None;
        }
        // Dimensions of which one goes on where the other ends are one; the innermost comes first.
        let mut merged: Vec<(usize, usize)> = Vec::new();
        for (&size, &stride) in leading.iter().zip(strides).rev().filter(|(size, _)| **size != 1) {
            match merged.last_mut() {
                Some((rows, row_stride)) if rows.checked_mul(*row_stride) == Some(stride) => {
                    *rows = rows.checked_mul(size)?;
                }
                _ => merged.push((size, stride)),
            }
        }
        let strides = match merged[..] {
            [] => vocab.into(),
            [(_, row_stride)] => row_stride.into(),
            [(rows, row_stride), (_, outer)] => Self::nested(rows, outer, row_stride),
            _ => return None,
        };
        let tokens = leading.iter().try_fold(1_usize, |tokens, &size| tokens.checked_mul(size))?;
        strides.span(tokens, vocab).is_ok().then_some(strides)
    }

    /// The same rows, if there are so many: evenly spaced if there is but one outer index.
    pub(crate) fn of(self, tokens: usize) -> Self {
        if tokens <= self.inner { self.row.into() } else { self }
    }

    /// Elements before a row.
    pub(crate) fn start(self, row: usize) -> usize {
        if self.inner == usize::MAX {
            row * self.row
        } else {
            row / self.inner * self.outer + row % self.inner * self.row
        }
    }

    /// Elements that so many rows span, or why they cannot.
    pub(crate) fn span(self, tokens: usize, vocab: usize) -> Result<usize, &'static str> {
        if vocab == 0 {
            return Err("the vocabulary must hold at least one token");
        }
        if self.inner == usize::MAX && self.row < vocab {
            return Err("the row stride must be at least the vocabulary size");
        }
        if self.inner == 0 || (self.inner != usize::MAX && !tokens.is_multiple_of(self.inner)) {
            return Err("the tokens must be a multiple of the rows within an outer index");
        }
        if tokens == 0 {
            return Ok(0);
        }
        let grid = self.grid(tokens);
        let within =
            (grid.rows - 1).checked_mul(grid.near).and_then(|start| start.checked_add(vocab));
        let span = within
            .zip((grid.groups - 1).checked_mul(grid.far))
            .and_then(|(within, start)| start.checked_add(within))
            .ok_or("tokens times row stride does not fit into the address space")?;
        if grid.is_apart(vocab) { Ok(span) } else { Err("the rows overlap") }
    }

    /// The elements, beyond evenly spaced rows, between an outer index and the next, and the rows of one.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    pub(crate) fn skip(self) -> (i64, usize) {
        if self.inner == usize::MAX {
            (0, 1)
        } else {
            ((self.outer as i64).wrapping_sub(self.inner.wrapping_mul(self.row) as i64), self.inner)
        }
    }

    /// Elements from a row to the next one of the same outer index.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    pub(crate) fn row(self) -> usize {
        self.row
    }

    /// Both dimensions of rows, not 0 of them.
    fn grid(self, tokens: usize) -> Grid {
        let rows = self.inner.min(tokens);
        let (inner, outer) = ((self.row, rows), (self.outer, tokens / rows));
        // A dimension of one has no stride.
        let outer_is_far = outer.1 == 1 || (inner.1 > 1 && outer.0 >= inner.0);
        let ((near, rows), (far, groups)) =
            if outer_is_far { (inner, outer) } else { (outer, inner) };
        Grid { near, rows, far, groups }
    }
}

/// Rows in groups: evenly spaced within one, and the groups by a stride that is not smaller.
struct Grid {
    near: usize,
    rows: usize,
    far: usize,
    groups: usize,
}

impl Grid {
    /// True if no element is in two rows. The last element's index must fit.
    fn is_apart(&self, vocab: usize) -> bool {
        let &Self { near, rows, far, groups } = self;
        let end = (rows - 1) * near + vocab;
        let mut starts = (1..groups).map(|group| group * far).take_while(|&start| start < end);
        (rows == 1 || near >= vocab)
            && starts.all(|start| {
                // The row of the first group that starts last before this, and the next.
                let before = (start / near.max(1)).min(rows - 1);
                start - before * near >= vocab
                    && (before + 1 == rows || (before + 1) * near - start >= vocab)
            })
    }
}

/// The rows of a matrix, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByteRows {
    start: i128,
    /// Bytes of a row.
    length: i128,
    near: i128,
    rows: i128,
    far: i128,
    groups: i128,
}

impl ByteRows {
    /// Rows whose span fits into the address space. `size` is an element's.
    pub(crate) fn new(
        address: u64,
        size: usize,
        strides: Strides,
        tokens: usize,
        vocab: usize,
    ) -> Self {
        let Grid { near, rows, far, groups } = match tokens {
            0 => Grid { near: 0, rows: 0, far: 0, groups: 0 },
            _ => strides.grid(tokens),
        };
        let [near, rows, far, groups, vocab, size] =
            [near, rows, far, groups, vocab, size].map(|number| number as i128);
        Self {
            start: address.into(),
            length: vocab * size,
            near: near * size,
            rows,
            far: far * size,
            groups,
        }
    }

    /// True if a byte is in a row of both.
    pub(crate) fn overlap(&self, other: &Self) -> bool {
        let extent = |rows: &Self| (rows.rows - 1) * rows.near + rows.length;
        (0..self.groups).any(|group| {
            let start = self.start + group * self.far;
            // The groups of the other that reach into this one's extent.
            let before = (start - extent(other) - other.start).div_euclid(other.far.max(1)) + 1;
            let last = (start + extent(self) - 1 - other.start).div_euclid(other.far.max(1));
            (before.max(0)..=last.min(other.groups - 1)).any(|group| {
                let distance = other.start + group * other.far - start;
                let steps = [(self.near, self.rows), (other.near, other.rows)];
                let up_to = |most| pairs(steps, most);
                up_to(distance + other.length - 1) != up_to(distance - self.length)
            })
        })
    }
}

/// How many pairs (i, j) of indices below the counts have `i * stride_i - j * stride_j <= most`.
fn pairs([(stride_i, count_i), (stride_j, count_j)]: [(i128, i128); 2], most: i128) -> i128 {
    // A count of one has no stride.
    let (stride_i, stride_j) = (stride_i.max(1), stride_j.max(1));
    // Up to `all` every j will do, from `none` on there is none; between, those from a quotient rounded up.
    let all = (most.div_euclid(stride_i) + 1).clamp(0, count_i);
    let none = ((most + (count_j - 1) * stride_j).div_euclid(stride_i) + 1).clamp(all, count_i);
    none * count_j - floor_sum(none - all, stride_j, stride_i, all * stride_i - most + stride_j - 1)
}

/// The sum of `(slope * i + offset) / divisor`, rounded down, over `i` below `count`; by Euclid's algorithm.
fn floor_sum(mut count: i128, mut divisor: i128, mut slope: i128, mut offset: i128) -> i128 {
    let mut sum = 0;
    while count > 0 {
        sum += count * (count - 1) / 2 * (slope / divisor) + count * (offset / divisor);
        (slope, offset) = (slope % divisor, offset % divisor);
        // The lattice points below the line, by columns instead of rows.
        let top = slope * count + offset;
        (count, offset) = (top / divisor, top % divisor);
        (divisor, slope) = (slope, divisor);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any rows of up to 24, near each other.
    fn random(random: &mut fastrand::Rng, vocab: usize) -> (Strides, usize) {
        let (inner, outer) = (random.usize(1..5), random.usize(1..6));
        let (one, other) = (random.usize(0..6 * vocab), random.usize(0..6 * vocab));
        let strides = if random.bool() { one.into() } else { Strides::nested(inner, one, other) };
        (strides, inner * outer)
    }

    fn disjoint(starts: &[usize], vocab: usize) -> bool {
        let mut starts = starts.to_vec();
        starts.sort_unstable();
        starts.windows(2).all(|pair| pair[1] - pair[0] >= vocab)
    }

    #[test]
    fn rows_overlap_where_two_share_an_element() {
        let mut generator = fastrand::Rng::with_seed(0);
        let mut seen = [0; 2];
        for _ in 0..20_000 {
            let vocab = generator.usize(1..7);
            let (strides, tokens) = random(&mut generator, vocab);
            let starts: Vec<_> = (0..tokens).map(|row| strides.start(row)).collect();
            let expected = disjoint(&starts, vocab);
            let span = strides.span(tokens, vocab);
            if expected && (strides.inner != usize::MAX || strides.row >= vocab) {
                let end = starts.iter().max().unwrap() + vocab;
                assert_eq!(span, Ok(end), "{strides}, {tokens} of {vocab}");
                assert_eq!(strides.of(tokens).span(tokens, vocab), span);
            } else {
                assert!(span.is_err(), "{strides}, {tokens} of {vocab}: {starts:?}");
            }
            seen[usize::from(expected)] += 1;
        }
        assert!(seen.iter().all(|&times| times > 2000), "{seen:?}");
    }

    #[test]
    fn matrices_overlap_where_rows_share_a_byte() {
        let mut generator = fastrand::Rng::with_seed(0);
        let mut seen = [0; 2];
        for _ in 0..40_000 {
            let vocab = generator.usize(1..7);
            let mut matrix = || loop {
                let (strides, tokens) = random(&mut generator, vocab);
                let address = generator.u64(0..60);
                let size = [2, 4][generator.usize(0..2)];
                if strides.span(tokens, vocab).is_ok() {
                    break (address, size, strides, tokens);
                }
            };
            let (one, other) = (matrix(), matrix());
            let rows = |(address, size, strides, tokens): (u64, usize, Strides, usize)| {
                let bytes = ByteRows::new(address, size, strides, tokens, vocab);
                let starts: Vec<_> = (0..tokens)
                    .map(|row| address as usize + strides.start(row) * size)
                    .map(|start| start..start + vocab * size)
                    .collect();
                (bytes, starts)
            };
            let ((a, starts_a), (b, starts_b)) = (rows(one), rows(other));
            let expected = starts_a
                .iter()
                .any(|a| starts_b.iter().any(|b| a.start < b.end && b.start < a.end));
            assert_eq!(a.overlap(&b), expected, "{vocab}: {one:?}, {other:?}");
            assert_eq!(b.overlap(&a), expected, "{vocab}: {other:?}, {one:?}");
            seen[usize::from(expected)] += 1;
        }
        assert!(seen.iter().all(|&times| times > 500), "{seen:?}");
    }

    #[test]
    fn many_rows_cost_no_time() {
        let rows = |address, stride: usize| ByteRows::new(address, 4, stride.into(), 1 << 58, 1);
        assert!(!rows(0, 2).overlap(&rows(4, 2)));
        assert!(!rows(4, 4).overlap(&rows(8, 2)));
        assert!(rows(4, 4).overlap(&rows(8, 3)));
    }
}
