package repo

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"syscall"
)

// processTable names this boot and this table of processes: a container has
// one of its own.
func processTable() (name string, ok bool) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", false
	}
	table, err := os.Readlink("/proc/self/ns/pid")
	return string(boot) + table, err == nil
}

// processStart is when process pid began, in ticks since the machine did. It
// gives fs.ErrNotExist if there is certainly no such process.
func processStart(pid int) (ticks int64, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, fs.ErrNotExist) && syscall.Kill(pid, 0) != syscall.ESRCH {
		return 0, fmt.Errorf("process %d is hidden", pid)
	}
	if err != nil {
		return 0, err
	}
	// The name, in brackets, may hold anything.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("process %d: its state has %d fields", pid, len(fields))
	}
	if string(fields[0]) == "Z" {
		return 0, fs.ErrNotExist // dead, and its parent has not asked yet
	}
	return strconv.ParseInt(string(fields[19]), 10, 64)
}
