//! The stacks of a launch's threads, all in one piece of memory: a system that allows 65530 mappings to a process, as
//! Linux does, has too few for a mapping and a guard page each.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use corosensei::stack::{STACK_ALIGNMENT, StackPointer};

/// Bytes of a stack. Threads take a quarter.
const BYTES: usize = 32 << 10;
/// Bytes below each stack, which stay zero unless a thread needs more than its stack.
const MARGIN: usize = 4 << 10;

pub struct Stacks {
    memory: NonNull<u8>,
    layout: Layout,
}

/// One of them. A coroutine takes none that borrows.
pub struct Stack {
    limit: NonNull<u8>,
}

impl Stacks {
    /// So many. The system gives each page when it is first touched.
    pub fn new(count: usize) -> Result<Self, String> {
        let layout = count
            .checked_mul(MARGIN + BYTES)
            .and_then(|bytes| Layout::from_size_align(bytes, STACK_ALIGNMENT).ok())
            .ok_or_else(|| format!("{count} threads at once have no room for their stacks"))?;
        // SAFETY: a launch has threads, and so the size is not 0.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(|| {
            format!(
                "{count} threads at once need {:.1} GB of address space for their stacks, which the system does not \
                 give",
                layout.size() as f64 / 1e9
            )
        })?;
        Ok(Self { memory, layout })
    }

    /// # Safety
    /// No coroutine runs on any of them at the same time as another on the same, nor after this is dropped.
    pub unsafe fn iter(&self) -> impl Iterator<Item = Stack> {
        (0..self.layout.size()).step_by(MARGIN + BYTES).map(|offset| {
            // SAFETY: inside the memory.
            let limit = unsafe { self.memory.add(offset) };
            Stack { limit }
        })
    }

    /// The first whose thread has needed more. No coroutine may be running.
    pub fn overflowed(&self) -> Option<usize> {
        // SAFETY: no coroutine is made.
        let mut stacks = unsafe { self.iter() };
        stacks.position(|stack| {
            // SAFETY: the margin is initialised memory, which only a thread that runs could write to.
            let margin = unsafe { std::slice::from_raw_parts(stack.limit.as_ptr(), MARGIN) };
            margin.iter().any(|&byte| byte != 0)
        })
    }
}

impl Drop for Stacks {
    fn drop(&mut self) {
        // SAFETY: from `alloc_zeroed` with this layout; nothing runs on the stacks, as `iter` asks for.
        unsafe { dealloc(self.memory.as_ptr(), self.layout) }
    }
}

// SAFETY: base and limit are aligned, and between them is memory of its own for as long as `iter` asks for. The margin
// takes the guard page's place: kernels recurse nowhere and have no frame of its size, and it is looked at after they
// have run.
unsafe impl corosensei::stack::Stack for Stack {
    fn base(&self) -> StackPointer {
        // SAFETY: one past the end of this stack.
        unsafe { self.limit.add(MARGIN + BYTES) }.addr()
    }

    fn limit(&self) -> StackPointer {
        self.limit.addr()
    }
}

#[cfg(test)]
mod tests {
    use corosensei::stack::Stack as _;

    use super::*;

    #[test]
    fn stacks_lie_apart_and_their_margins_are_watched() {
        let stacks = Stacks::new(3).unwrap();
        // SAFETY: no coroutine is made.
        let iter = || unsafe { stacks.iter() };
        let ends: Vec<_> = iter().map(|stack| (stack.limit().get(), stack.base().get())).collect();
        assert_eq!(ends.len(), 3);
        assert!(ends.windows(2).all(|pair| pair[0].1 <= pair[1].0));
        assert!(
            ends.iter().all(|end| end.1 - end.0 == MARGIN + BYTES && end.1 % STACK_ALIGNMENT == 0)
        );
        assert_eq!(stacks.overflowed(), None);
        let second = iter().nth(1).unwrap();
        // SAFETY: the lowest byte of the second stack, and the highest of its margin.
        unsafe { second.limit.add(MARGIN).write(1) };
        assert_eq!(stacks.overflowed(), None);
        // SAFETY: as above.
        unsafe { second.limit.add(MARGIN - 1).write(1) };
        assert_eq!(stacks.overflowed(), Some(1));
    }

    #[test]
    fn what_the_system_does_not_give_is_an_error() {
        for count in [1 << 40, usize::MAX] {
            // The optimizer may drop an allocation that nothing looks at, and then the system refuses nothing.
            let stacks = std::hint::black_box(Stacks::new(count));
            assert!(stacks.err().unwrap().contains(&format!("{count} threads")));
        }
    }
}
