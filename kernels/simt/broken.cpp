// Kernels with the mistakes that the simulator must catch, one each.
#include "../reduce.cuh"

typedef struct {
    uint32_t *data; // one element a thread
} atkd_broken;

// Reads what another thread writes, without the barrier between.
ATKD_KERNEL(broken_missing_barrier, atkd_broken, 64, 1) {
    ATKD_SHARED(uint32_t, cells, 64);
    cells[thread_index()] = 0;
    ATKD_SYNC_BLOCK();
    cells[thread_index()] = thread_index() + 1;
    store(p.data + thread_index(), uint32_t(cells[63 - thread_index()]));
}

// Half of the threads never reach the barrier.
ATKD_KERNEL(broken_divergent_barrier, atkd_broken, 64, 1) {
    if (thread_index() < 32) {
        ATKD_SYNC_BLOCK();
    }
    store(p.data + thread_index(), 1u);
}

// Two groups wait at different barriers.
ATKD_KERNEL(broken_two_barriers, atkd_broken, 64, 1) {
    if (thread_index() < 32) {
        ATKD_SYNC_BLOCK();
    } else {
        ATKD_SYNC_BLOCK();
    }
    store(p.data + thread_index(), 1u);
}

// A lane leaves before the shuffle that the others wait for it at.
ATKD_KERNEL(broken_shuffle, atkd_broken, 64, 1) {
    if (thread_index() % WARP != 5) {
        store(p.data + thread_index(), shuffle_xor(thread_index(), 1));
    }
}

ATKD_KERNEL(broken_read_outside, atkd_broken, 64, 1) {
    store(p.data + thread_index(), load(p.data + thread_index() + 1));
}

ATKD_KERNEL(broken_write_outside, atkd_broken, 64, 1) { store(p.data - thread_index(), 1u); }

ATKD_KERNEL(broken_alignment, atkd_broken, 64, 1) {
    if (thread_index() == 0) {
        store16(p.data, load16(p.data + 1));
    }
}

ATKD_KERNEL(broken_unwritten_shared, atkd_broken, 64, 1) {
    ATKD_SHARED(uint32_t, cells, 64);
    if (thread_index() != 9) {
        cells[thread_index()] = 1;
    }
    ATKD_SYNC_BLOCK();
    store(p.data + thread_index(), uint32_t(cells[thread_index()]));
}

ATKD_KERNEL(broken_shared_bounds, atkd_broken, 64, 1) {
    ATKD_SHARED(uint32_t, cells, 32);
    cells[thread_index()] = 1;
    store(p.data + thread_index(), 1u);
}

// Reads what another block writes, without the cluster's barrier between.
ATKD_KERNEL(broken_missing_cluster_barrier, atkd_broken, 32, 1) {
    ATKD_SHARED(uint32_t, cells, 32);
    cells[thread_index()] = 0;
    ATKD_SYNC_CLUSTER();
    cells[thread_index()] = 7;
    uint32_t other = ATKD_REMOTE(cells, thread_index(), 1 - cluster_rank());
    ATKD_SYNC_CLUSTER();
    store(p.data + block_index() * 32 + thread_index(), other);
}

// One block never reaches the cluster's barrier.
ATKD_KERNEL(broken_cluster_barrier, atkd_broken, 32, 1) {
    if (cluster_rank() == 0) {
        ATKD_SYNC_CLUSTER();
    }
    store(p.data + thread_index(), 1u);
}

// A block ends while another still reads its shared memory.
ATKD_KERNEL(broken_remote, atkd_broken, 32, 1) {
    ATKD_SHARED(uint32_t, cells, 32);
    cells[thread_index()] = thread_index();
    ATKD_SYNC_CLUSTER();
    if (cluster_rank() == 1) {
        for (uint32_t turn = 0; turn < 100; turn++) {
            ATKD_SYNC_BLOCK();
        }
        store(p.data + thread_index(), uint32_t(ATKD_REMOTE(cells, thread_index(), 0)));
    }
}

// There are two blocks in the cluster.
ATKD_KERNEL(broken_rank, atkd_broken, 32, 1) {
    ATKD_SHARED(uint32_t, cells, 32);
    store(p.data + thread_index(), uint32_t(ATKD_REMOTE(cells, 0, 2)));
}
