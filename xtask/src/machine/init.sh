#!/bin/busybox sh
# Process 1 of the guest. It takes scripts from the second serial line, one a line: "ID BASE64". To each it answers
# "@ID STATUS LENGTH" on a line of its own, then as many bytes: what the script wrote.
/bin/busybox --install -s
export PATH=/usr/bin:/usr/sbin:/bin:/sbin HOME=/root LD_LIBRARY_PATH=/usr/lib
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/lib/modules/$module.ko" || echo "insmod $module failed"
done </etc/modules
ip link set lo up
exec 3<>/dev/ttyS1
stty -F /dev/ttyS1 raw -echo
echo "@ready" >&3
while read -r id script <&3; do
    echo "$script" | base64 -d >/tmp/.script
    sh /tmp/.script </dev/null >/tmp/.output 2>&1 3>&-
    status=$?
    printf '@%s %s %s\n' "$id" "$status" "$(stat -c %s /tmp/.output)" >&3
    cat /tmp/.output >&3
done
echo "the second serial line is closed"
poweroff -f
