package repo

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"

	"github.com/backstay/backstay/internal/blob/file"
)

// Tests of several processes run this test binary again, told by these what to
// be in which repository.
const (
	processDir  = "BACKSTAY_TEST_PROCESS_DIR"
	processRole = "BACKSTAY_TEST_PROCESS_ROLE"
	processWhat = "BACKSTAY_TEST_PROCESS_WHAT"
	processSeed = "BACKSTAY_TEST_PROCESS_SEED"
)

func init() {
	dir := os.Getenv(processDir)
	if dir == "" {
		return
	}
	if err := play(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// play does what a process was told to. What it prints is for its test.
func play(dir string) error {
	role := map[string]func(r *Repository, what string, seed uint64) error{
		"victim": beVictim, "writer": beWriter, "one of many": beOneOfMany,
	}[os.Getenv(processRole)]
	seed, err := strconv.ParseUint(os.Getenv(processSeed), 10, 64)
	if err != nil {
		return err
	}
	st, err := file.Open(dir)
	if err != nil {
		return err
	}
	defer st.Close()
	r, err := Open(bg, st, testKey)
	if err != nil {
		return err
	}
	return role(r, os.Getenv(processWhat), seed)
}

// player is a process that plays a role in the repository in dir once it is
// started.
func player(dir, role, what string, seed uint64) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), processDir+"="+dir, processRole+"="+role, processWhat+"="+what, processSeed+"="+strconv.FormatUint(seed, 10))
	return cmd
}
