//! How a call is cut into blocks: a pure function of the shapes and the device.

use std::fmt;

/// What a plan needs to know of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceProperties {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the L2 cache.
    pub l2_bytes: usize,
    /// Blocks that can form a cluster: 8 from compute capability 9.0, 1 before.
    pub largest_cluster: u32,
}

/// How one kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchShape {
    /// Blocks.
    pub grid: u32,
    /// Threads in a block, whole warps.
    pub block: u32,
    /// Blocks in a cluster.
    pub cluster: u32,
}

impl fmt::Display for LaunchShape {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} blocks of {} threads", self.grid, self.block)?;
        if self.cluster > 1 { write!(f, ", clusters of {}", self.cluster) } else { Ok(()) }
    }
}

/// The launch of every kernel that a call may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// `teacher_margin`: the teacher's rows are read once.
    pub margin: LaunchShape,
    /// `count_valid`: the labels are read.
    pub count: LaunchShape,
    /// `select_hard`: the keys are read from the L2 cache.
    pub select: LaunchShape,
    /// `row_stream`: both models' rows are read twice, the gradient is written.
    pub rows: LaunchShape,
    /// Bytes of the rows that are in flight at once in `row_stream`: what its second read must find in
    /// the L2 cache.
    pub rows_in_flight_bytes: usize,
    /// `sum_losses`.
    pub sum: LaunchShape,
}

const WARP: usize = 32;
/// Logits that a thread handles at once, as in kernels/memory.cuh.
const CHUNK: usize = 8;
/// Of the launch bounds of each kernel: threads a block, blocks a multiprocessor.
const MARGIN_THREADS: usize = 384;
const ROWS_THREADS: usize = 384;
const ROWS_RESIDENT: usize = 2;
const COUNT_THREADS: usize = 256;
const SELECT_THREADS: usize = 1024;

/// Threads for `work` items, `each` of them a thread, up to `most`.
fn threads(work: usize, each: usize, most: usize) -> u32 {
    work.div_ceil(each).next_multiple_of(WARP).clamp(WARP, most) as u32
}

impl Plan {
    /// For `tokens` rows of `vocab` logits, of which a teacher's and a student's element together take
    /// `pair_bytes`, with hard tokens selected in `scopes` parts. All at most `i32::MAX`.
    pub fn new(
        device: &DeviceProperties,
        tokens: usize,
        vocab: usize,
        pair_bytes: usize,
        scopes: usize,
    ) -> Self {
        let chunks = vocab.div_ceil(CHUNK);
        let shape = |grid: usize, block, cluster: u32| {
            let most = i32::MAX as u32 / cluster * cluster;
            let grid = u32::try_from(grid).unwrap_or(most).min(most);
            LaunchShape { grid, block, cluster }
        };
        // Clusters only as large as it takes for the rows in flight to fill half of the L2 cache, and
        // only where every thread still has a chunk.
        let blocks_in_flight = device.multiprocessors as usize * ROWS_RESIDENT;
        let in_flight = |cluster: u32| {
            (blocks_in_flight / cluster as usize).clamp(1, tokens.max(1)) * vocab * pair_bytes
        };
        let mut cluster = 1;
        while cluster < device.largest_cluster
            && in_flight(cluster) > device.l2_bytes / 2
            && chunks >= 2 * cluster as usize * ROWS_THREADS
            && tokens.saturating_mul(2 * cluster as usize) <= i32::MAX as usize
        {
            cluster *= 2;
        }
        let largest_scope = tokens.div_ceil(scopes.max(1));
        let select_blocks = (largest_scope.div_ceil(SELECT_THREADS).next_power_of_two() as u32)
            .clamp(1, device.largest_cluster);
        Self {
            margin: shape(tokens, threads(chunks, 4, MARGIN_THREADS), 1),
            count: shape(tokens.div_ceil(COUNT_THREADS), COUNT_THREADS as u32, 1),
            select: shape(
                scopes * select_blocks as usize,
                threads(largest_scope, 1, SELECT_THREADS),
                select_blocks,
            ),
            rows: shape(
                tokens * cluster as usize,
                threads(chunks, 4 * cluster as usize, ROWS_THREADS),
                cluster,
            ),
            rows_in_flight_bytes: in_flight(cluster),
            sum: shape(1, threads(tokens, 4, 1024), 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: DeviceProperties =
        DeviceProperties { multiprocessors: 132, l2_bytes: 50 << 20, largest_cluster: 8 };
    const A100: DeviceProperties =
        DeviceProperties { multiprocessors: 108, l2_bytes: 40 << 20, largest_cluster: 1 };

    #[test]
    fn rows_in_flight_fit_the_cache() {
        for vocab in [32_000, 50_257, 128_256, 151_936] {
            let plan = Plan::new(&H200, 8192, vocab, 4, 1);
            assert!(plan.rows_in_flight_bytes <= H200.l2_bytes / 2, "{vocab}: {plan:?}");
            assert_eq!(plan.rows.grid, 8192 * plan.rows.cluster);
        }
        assert_eq!(Plan::new(&H200, 8192, 128_256, 4, 1).rows.cluster, 8);
        // Larger clusters there are not; the whole cache holds the rows still.
        let plan = Plan::new(&H200, 8192, 256_000, 4, 1);
        assert!(plan.rows.cluster == 8 && plan.rows_in_flight_bytes < H200.l2_bytes);
        assert_eq!(Plan::new(&H200, 8192, 4096, 4, 1).rows.cluster, 1);
        assert_eq!(Plan::new(&A100, 8192, 128_256, 4, 1).rows.cluster, 1);
        // So few rows are in flight together anyway.
        assert_eq!(Plan::new(&H200, 32, 128_256, 4, 1).rows.cluster, 1);
    }

    #[test]
    fn small_work_takes_small_blocks() {
        let plan = Plan::new(&H200, 1, 1, 8, 1);
        let one_warp = LaunchShape { grid: 1, block: 32, cluster: 1 };
        assert_eq!([plan.margin, plan.rows, plan.select, plan.sum], [one_warp; 4]);
        assert_eq!(plan.count, LaunchShape { grid: 1, block: 256, cluster: 1 });
        let plan = Plan::new(&H200, 131_072, 32_000, 4, 1);
        assert_eq!(plan.select, LaunchShape { grid: 8, block: 1024, cluster: 8 });
        let plan = Plan::new(&H200, 8192, 32_000, 4, 64);
        assert_eq!(plan.select, LaunchShape { grid: 64, block: 128, cluster: 1 });
    }

    #[test]
    fn grids_stay_within_what_a_device_launches() {
        let plan = Plan::new(&H200, i32::MAX as usize, i32::MAX as usize, 8, i32::MAX as usize);
        for shape in [plan.margin, plan.count, plan.select, plan.rows, plan.sum] {
            assert!(shape.grid <= i32::MAX as u32 && shape.grid % shape.cluster == 0, "{shape:?}");
        }
        assert_eq!(plan.rows, LaunchShape { grid: i32::MAX as u32, block: 384, cluster: 1 });
    }
}
