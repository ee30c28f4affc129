#ifndef USERNIC_INLINE_H
#define USERNIC_INLINE_H

#ifdef __cplusplus
extern "C" {
#endif

/* Opens a port: see usernic_port_open_abi(). */
static inline int32_t usernic_port_open(const char *spec, usernic_port **out) {
    return usernic_port_open_abi(USERNIC_ABI_VERSION, spec, out);
}

/* Opens a port over lent memory: see usernic_lent_port_open_abi(). */
static inline int32_t usernic_lent_port_open(const char *spec, const usernic_region *regions, uint32_t count,
                                             usernic_lent_port **out) {
    return usernic_lent_port_open_abi(USERNIC_ABI_VERSION, spec, regions, count, out);
}

/* Makes room for count bytes before a frame; where they are. NULL: there is no such headroom. The bytes are whatever was
   there before: write them. */
static inline uint8_t *usernic_frame_push(usernic_frame *frame, uint16_t count) {
    if (count > frame->headroom)
        return NULL;
    frame->flags |= USERNIC_FRAME_PUSHED;
    frame->headroom = (uint16_t)(frame->headroom - count);
    frame->data -= count;
    frame->len += count;
    frame->room += count;
    return frame->data;
}

/* Takes count bytes off the front of a frame; where it begins now. NULL: the first piece of it has fewer. */
static inline uint8_t *usernic_frame_pull(usernic_frame *frame, uint16_t count) {
    if (count > frame->len || count > frame->room)
        return NULL;
    frame->headroom = (uint16_t)(frame->headroom + count);
    frame->data += count;
    frame->len -= count;
    frame->room -= count;
    return frame->data;
}

/* Makes a frame equal to len bytes. -1: they do not fit in one piece (usernic_burst_set_len() makes more). */
static inline int usernic_frame_copy(usernic_frame *frame, const void *bytes, uint32_t len) {
    if (len > frame->room || (frame->flags & USERNIC_FRAME_PIECES))
        return -1;
    memcpy(frame->data, bytes, len);
    frame->len = len;
    return 0;
}

#ifdef __cplusplus
}
#endif

#endif /* USERNIC_INLINE_H */
