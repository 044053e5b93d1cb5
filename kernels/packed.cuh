// Rows of logits as packed vectors: chunks of 8 elements, loaded, masked, unpacked, packed and stored. A chunk is
// full if all of its elements are in the row and it starts at a multiple of 16 bytes; others go element by element.
#pragma once

#include "machine.cuh"

// Logits that one thread handles at once: 16 bytes of half precision, twice that of single.
constexpr uint32_t CHUNK = ATKD_CHUNK;

// The bytes of a line of the L2 cache.
constexpr uint32_t LINE = ATKD_LINE;

// The start of a row of a matrix. The branch goes one way for all rows of a launch; without it the compiler computes
// the product anew in every iteration of a loop, to save registers.
template <class T> ATKD_DEVICE T *row_at(T *first, const atkd_strides &strides, uint32_t row) {
    int64_t start = int64_t(row) * strides.stride;
    if (ATKD_RARELY(strides.inverse != 0)) {
        start += int64_t(uint32_t(uint64_t(row) * strides.inverse >> 32) >> strides.shift) * strides.skip;
    }
    return first + start;
}

// A row of V elements, seen as chunks. Chunk 0 starts at or before the row, so that every later chunk
// starts at a multiple of its own bytes; what lies outside the row does not exist.
template <class T> struct Row {
    T *data;
    uint32_t vocab;
    // Chunk c is elements c * CHUNK - head ... + CHUNK - 1.
    uint32_t head;
    // The full chunks: all of their elements are in the row, and they start at multiples of 16 bytes.
    uint32_t first_full, full_count;

    // `head` may be another row's; this one is read element by element where that is not its own alignment.
    ATKD_DEVICE Row(T *row, uint32_t vocab_, uint32_t head_)
        : data(row), vocab(vocab_), head(head_), first_full((head_ + CHUNK - 1) / CHUNK), full_count(0) {
        uint32_t end = (vocab + head) / CHUNK;
        if ((reinterpret_cast<uintptr_t>(row) - head * sizeof(T)) % 16 == 0 && end > first_full) {
            full_count = end - first_full;
        }
    }

    ATKD_DEVICE uint32_t chunks() const { return (vocab + head + CHUNK - 1) / CHUNK; }

    ATKD_DEVICE bool full(uint32_t chunk) const { return chunk - first_full < full_count; }

    // The chunk that an element is in.
    ATKD_DEVICE uint32_t chunk_of(uint32_t element) const { return (element + head) / CHUNK; }

    // An element's place in a chunk; CHUNK or more if it is in another.
    ATKD_DEVICE uint32_t within(uint32_t element, uint32_t chunk) const { return element - (chunk * CHUNK - head); }

    // The start of a chunk, which may be before the row.
    ATKD_DEVICE T *at(uint32_t chunk) const {
        // With integers the compiler makes one instruction of it, with pointers three.
        uintptr_t start = reinterpret_cast<uintptr_t>(data) - head * sizeof(T);
        return reinterpret_cast<T *>(start + uint64_t(chunk) * (CHUNK * sizeof(T)));
    }
};

// The head offset: how many elements before the row a multiple of `bytes` lies, which are a chunk's by default.
template <class T> ATKD_DEVICE uint32_t head_of(const T *row, uint32_t bytes = CHUNK * sizeof(T)) {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row) % bytes) / static_cast<uint32_t>(sizeof(T));
}

constexpr float NEG_INF = -__builtin_huge_valf();

// A chunk as it lies in memory.
template <class T> struct Packed {
    static constexpr uint32_t PARTS = CHUNK * sizeof(T) / 16, PER = CHUNK / PARTS;
    Bytes16 part[PARTS];
};

// By shifts and not through a pointer, for which the compiler may want an address, and so local memory.
template <class T> ATKD_DEVICE T element_of(const Bytes16 &bytes, uint32_t index) {
    uint32_t word = bytes.word[index * sizeof(T) / 4];
    return from_bits<T>(sizeof(T) == 2 && index % 2 == 1 ? word >> 16 : word);
}
template <class T> ATKD_DEVICE void set_element(Bytes16 &bytes, uint32_t index, T value) {
    uint32_t &word = bytes.word[index * sizeof(T) / 4], bits = to_bits(value);
    word = sizeof(T) == 4 ? bits : index % 2 == 1 ? (word & 0xffffu) | bits << 16 : (word & 0xffff0000u) | bits;
}

// Loads a full chunk.
template <bool STREAMING = false, class T>
ATKD_DEVICE Packed<T> load_full(const Row<const T> &row, uint32_t chunk) {
    Packed<T> packed = {};
    ATKD_UNROLL
    for (uint32_t i = 0; i < Packed<T>::PARTS; i++) {
        packed.part[i] = load16<STREAMING>(row.at(chunk) + i * Packed<T>::PER);
    }
    return packed;
}

// Loads a chunk, -inf outside the row.
template <class T> ATKD_DEVICE Packed<T> load_packed(const Row<const T> &row, uint32_t chunk) {
    if (ATKD_RARELY(!row.full(chunk))) {
        Packed<T> packed = {};
        constexpr uint32_t PER = Packed<T>::PER;
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            uint32_t j = chunk * CHUNK + k - row.head;
            T z = j < row.vocab ? load(row.at(chunk) + k) : narrow<T>(NEG_INF);
            set_element<T>(packed.part[k / PER], k % PER, z);
        }
        return packed;
    }
    return load_full(row, chunk);
}

template <class T> ATKD_DEVICE Packed<T> all_neg_inf() {
    Packed<T> packed = {};
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        set_element<T>(packed.part[k / Packed<T>::PER], k % Packed<T>::PER, narrow<T>(NEG_INF));
    }
    return packed;
}

template <class T> ATKD_DEVICE void unpack(const Packed<T> &packed, float (&x)[CHUNK]) {
    constexpr uint32_t PER = Packed<T>::PER;
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        x[k] = widen(element_of<T>(packed.part[k / PER], k % PER));
    }
}
// A bf16 is the upper half of the float: one instruction each.
template <> ATKD_DEVICE void unpack(const Packed<bf16> &packed, float (&x)[CHUNK]) {
    ATKD_UNROLL
    for (uint32_t i = 0; i < 4; i++) {
        x[2 * i] = from_bits<float>(packed.part[0].word[i] << 16);
        x[2 * i + 1] = from_bits<float>(packed.part[0].word[i] & 0xffff0000u);
    }
}

// Replaces one element.
template <class T> ATKD_DEVICE void insert(uint32_t within, T value, Packed<T> &packed) {
    constexpr uint32_t PER = Packed<T>::PER;
    ATKD_UNROLL
    for (uint32_t k = 0; k < CHUNK; k++) {
        if (within == k) {
            set_element<T>(packed.part[k / PER], k % PER, value);
        }
    }
}

// Makes one element -inf.
template <class T> ATKD_DEVICE void mask_out(uint32_t within, Packed<T> &packed) {
    insert(within, narrow<T>(NEG_INF), packed);
}

// A chunk, widened; -inf outside the row.
template <class T> ATKD_DEVICE void load_chunk(const Row<const T> &row, uint32_t chunk, float (&x)[CHUNK]) {
    unpack(load_packed(row, chunk), x);
}

// Word i of a chunk in memory.
template <class T> ATKD_DEVICE uint32_t pack_word(const float (&x)[CHUNK], uint32_t i) {
    return narrow_two<T>(x[2 * i], x[2 * i + 1]);
}
template <> ATKD_DEVICE uint32_t pack_word<float>(const float (&x)[CHUNK], uint32_t i) { return to_bits(x[i]); }

template <class T> ATKD_DEVICE Packed<T> pack(const float (&x)[CHUNK]) {
    Packed<T> packed = {};
    ATKD_UNROLL
    for (uint32_t i = 0; i < 4 * Packed<T>::PARTS; i++) {
        packed.part[i / 4].word[i % 4] = pack_word<T>(x, i);
    }
    return packed;
}

template <class T> ATKD_DEVICE void store_full(const Row<T> &row, uint32_t chunk, const float (&x)[CHUNK]) {
    Packed<T> packed = pack<T>(x);
    ATKD_UNROLL
    for (uint32_t i = 0; i < Packed<T>::PARTS; i++) {
        store16(row.at(chunk) + i * Packed<T>::PER, packed.part[i]);
    }
}

template <class T> ATKD_DEVICE void store_chunk(const Row<T> &row, uint32_t chunk, const float (&x)[CHUNK]) {
    if (ATKD_RARELY(!row.full(chunk))) {
        ATKD_UNROLL
        for (uint32_t k = 0; k < CHUNK; k++) {
            uint32_t j = chunk * CHUNK + k - row.head;
            if (j < row.vocab) {
                store(row.at(chunk) + k, narrow<T>(x[k]));
            }
        }
        return;
    }
    store_full(row, chunk, x);
}
