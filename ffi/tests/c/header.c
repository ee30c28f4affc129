/* Compiled as C11 and as C++17, linked with either library: the header, its inline functions, errors, versions. */
#include <usernic.h>
#include <usernic.h>
#include <stdio.h>

int main(void) {
    usernic_port *port = NULL;
    uint8_t buffer[64] = {0};
    usernic_frame frame;
    memset(&frame, 0, sizeof frame);
    frame.data = buffer + 16;
    frame.room = 48;
    frame.headroom = 16;
    if (usernic_abi_version() != USERNIC_ABI_VERSION)
        return 1;
    if (usernic_port_open_abi(USERNIC_ABI_VERSION + 1, "vhost,path=/x", &port) != USERNIC_STATUS_ABI)
        return 2;
    if (usernic_port_open("virtio-usr", &port) != USERNIC_STATUS_SPEC || port != NULL)
        return 3;
    if (strstr(usernic_error(), "virtio-user") == NULL)
        return 4;
    if (usernic_queue_rx(NULL, NULL) != USERNIC_STATUS_HANDLE)
        return 5;
    if (usernic_frame_copy(&frame, "0123456789", 10) != 0 || frame.len != 10)
        return 6;
    if (usernic_frame_push(&frame, 17) != NULL || usernic_frame_push(&frame, 16) != buffer || frame.len != 26)
        return 7;
    if (usernic_frame_pull(&frame, 27) != NULL || usernic_frame_pull(&frame, 26) != buffer + 26 || frame.len != 0)
        return 8;
    if (frame.room != 38 || frame.headroom != 26 || usernic_frame_copy(&frame, buffer, 39) != -1)
        return 9;
    printf("usernic %s, interface %u\n", usernic_version(), (unsigned)usernic_abi_version());
    return 0;
}
