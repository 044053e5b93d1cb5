//! The threads of a call.

use std::sync::{Mutex, PoisonError};

use rayon::{Scope, ThreadPool};

/// The calling thread, and all but one of a pool's: rayon's current pool if none is given.
///
/// The caller works rather than waits: it has the data that a caller's caches hold, and a thread that is
/// woken while another sleeps may find itself on the same core as a third. It waits for the others, even if
/// they come too late for any work: a caller must not hold what they wait for.
#[derive(Clone, Copy, Default)]
pub struct Team<'a>(pub Option<&'a ThreadPool>);

impl Team<'_> {
    fn threads(self) -> usize {
        self.0.map_or_else(rayon::current_num_threads, ThreadPool::current_num_threads)
    }

    /// `work` on every item, in the items' order. Each thread makes itself one `S`.
    pub fn map<T: Send, S, R: Send>(
        self,
        items: Vec<T>,
        start: impl Fn() -> S + Sync,
        work: impl Fn(&mut S, T) -> R + Sync,
    ) -> Vec<R> {
        let (count, threads) = (items.len(), self.threads());
        let waiting = Mutex::new(items.into_iter().enumerate());
        let done = Mutex::new(Vec::from_iter((0..count).map(|_| None)));
        let take = || {
            let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            // Less and less, so that all end at about the same time.
            let share = waiting.len().div_ceil(4 * threads);
            waiting.by_ref().take(share).collect::<Vec<_>>()
        };
        let run = || {
            let mut own = None;
            loop {
                let taken = take();
                if taken.is_empty() {
                    break;
                }
                let own = own.get_or_insert_with(&start);
                let work = |(index, item)| (index, work(own, item));
                let results: Vec<_> = taken.into_iter().map(work).collect();
                let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                results.into_iter().for_each(|(index, result)| done[index] = Some(result));
            }
        };
        let helpers = threads.min(count).saturating_sub(1);
        match self.0 {
            Some(pool) => pool.in_place_scope(|scope| run_beside(scope, helpers, &run)),
            None => rayon::in_place_scope(|scope| run_beside(scope, helpers, &run)),
        }
        let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.into_iter().map(|result| result.expect("every item was taken")).collect()
    }
}

fn run_beside<'a>(scope: &Scope<'a>, helpers: usize, run: &'a (impl Fn() + Sync)) {
    for _ in 0..helpers {
        scope.spawn(move |_| run());
    }
    run();
}

#[cfg(test)]
mod tests {
    use super::Team;

    #[test]
    fn results_are_in_the_order_of_the_items() {
        for threads in [1, 2, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for count in [0, 1, 2, 9, 1000] {
                let squares =
                    |team: Team| team.map((0..count).collect(), || (), |(), item: u64| item * item);
                let expected: Vec<u64> = (0..count).map(|item| item * item).collect();
                assert_eq!(squares(Team(Some(&pool))), expected);
                assert_eq!(pool.install(|| squares(Team(None))), expected);
                assert_eq!(pool.install(|| squares(Team(Some(&pool)))), expected);
            }
        }
    }

    /// The pool's only thread waits for the caller, who needs no other than itself.
    #[test]
    fn a_caller_works() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let (release, released) = std::sync::mpsc::channel::<()>();
        pool.spawn(move || released.recv().unwrap());
        let here = std::thread::current().id();
        let threads =
            Team(Some(&pool)).map(vec![(); 5], || (), |(), ()| std::thread::current().id());
        assert_eq!(threads, [here; 5]);
        release.send(()).unwrap();
    }

    #[test]
    #[should_panic = "item 3"]
    fn a_panic_reaches_the_caller() {
        Team(None).map((0..5).collect(), || (), |(), item| assert_ne!(item, 3, "item 3"));
    }
}
