#!/bin/sh
# Gives the guest's testpmd a line, and shows what it answers, up to its next prompt.
from=$(stat -c %s /tmp/testpmd.out)
echo "$*" >/tmp/testpmd.in
for i in $(seq 1200); do
    # It echoes the line first, behind the prompt that was there already.
    tail -c +$((from + 1)) /tmp/testpmd.out >/tmp/testpmd.answer
    if grep -q '^testpmd> ' /tmp/testpmd.answer; then
        cat /tmp/testpmd.answer
        ! grep -qE 'Bad arguments|Command not found|Error|[Ff]ailed|[Ff]ail to' /tmp/testpmd.answer
        exit
    fi
    usleep 25000
done
echo "no answer of testpmd to \"$*\":"
cat /tmp/testpmd.out
exit 1
