//! Memory that starts where a line of the GPU's caches does.

use std::ops::{Deref, DerefMut};

/// Bytes of a line.
const LINE: usize = 128;

/// Elements of which the first starts a line. Where rows start decides how a kernel cuts them, and with that the last bits
/// of its sums: by this alone is a test the same from run to run.
pub struct Aligned<T> {
    memory: Vec<T>,
    start: usize,
}

impl<T> FromIterator<T> for Aligned<T>
where
    T: Copy + Default,
{
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        let elements: Vec<T> = elements.into_iter().collect();
        let mut memory: Vec<T> = Vec::with_capacity(elements.len() + LINE / size_of::<T>());
        let start = memory.as_ptr().align_offset(LINE);
        memory.resize(start, T::default());
        memory.extend(elements);
        Self { memory, start }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.memory[self.start..]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..]
    }
}
