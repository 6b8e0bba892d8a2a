/* What is counted, for all parts of the fake runtime. */
#ifdef __cplusplus
extern "C" {
#endif

enum Count {
    LAUNCHES,
    PRODUCTS,
    MEMSETS,
    TO_DEVICE,
    TO_HOST,
    ON_DEVICE,
    STREAM_SYNCS,
    DEVICE_SYNCS,
    EVENT_SYNCS,
    COLLECTIVES,
    ALLOCATIONS,
    NUM_COUNTS
};

void fake_count(enum Count what);

#ifdef __cplusplus
}
#endif
