package file_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/fault"
)

// The claimant of TestClaimsOfAnotherProcess is this test binary, told so by
// this.
const claimDir = "BACKSTAY_TEST_CLAIM_DIR"

func init() {
	if dir := os.Getenv(claimDir); dir != "" {
		if err := claimFor(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// claimFor stores the first series of keys, and goes on to store the second.
func claimFor(dir string) error {
	st, err := file.Open(dir)
	if err != nil {
		return err
	}
	ctx := context.Background()
	_, _, err = st.Claim(ctx, blob.Ticket{1}, blobtest.ClaimKeys(1, 5))
	if err == nil {
		err = st.Settle(ctx, blob.Ticket{1}, &[32]byte{7})
	}
	if err == nil {
		_, _, err = st.Claim(ctx, blob.Ticket{2}, blobtest.ClaimKeys(2, 5))
	}
	if err != nil {
		return err
	}
	fmt.Println("claimed")
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
	return nil
}

// What another process is storing is known until it is dead, also while it is
// stopped; and what it has stored as long as anybody who knows it lives.
func TestClaimsOfAnotherProcess(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	st := create(t, dir)
	blobtest.WantClaim(t, st, 1, blobtest.ClaimKeys(3, 1), 0, 0)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), claimDir+"="+dir)
	cmd.Stderr = os.Stderr
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if said, err := bufio.NewReader(out).ReadString('\n'); said != "claimed\n" {
		t.Fatalf("it said %q: %v", said, err)
	}
	both := append(blobtest.ClaimKeys(1, 5), blobtest.ClaimKeys(2, 5)...)
	if in := blobtest.WantClaim(t, st, 2, both, 5, 5); in[4] != [32]byte{7} {
		t.Errorf("they are in %x", in)
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	blobtest.WantClaim(t, st, 2, both, 5, 5)
	blobtest.WantClaim(t, create(t, dir), 2, both, 5, 5)
	cmd.Process.Kill()
	cmd.Wait()
	blobtest.WantClaim(t, st, 2, both, 0, 5)
	blobtest.WantClaim(t, create(t, dir), 2, both, 5, 5)
}

// Whatever lies where claims belong, nothing comes of it but that there are none.
func TestNoPlaceForClaims(t *testing.T) {
	for what, place := range map[string]func(place string) error{
		"a directory":    func(p string) error { return os.Mkdir(p, 0o700) },
		"a pipe":         func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"a link outside": func(p string) error { return os.Symlink("/etc/hostname", p) },
		"a link to none": func(p string) error { return os.Symlink("/none/at/all", p) },
		"a circle":       func(p string) error { return os.Symlink(".claims", p) },
		"a device":       func(p string) error { return os.Symlink("/dev/zero", p) },
		"no lock at all": func(p string) error {
			return errors.Join(os.Remove(filepath.Dir(p)), os.WriteFile(filepath.Dir(p), nil, 0o600))
		},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.Mkdir(filepath.Join(dir, "lock"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := place(filepath.Join(dir, "lock", ".claims")); err != nil {
				t.Fatal(err)
			}
			st := create(t, dir)
			for range 2 {
				if _, _, err := st.Claim(t.Context(), blob.Ticket{1}, blobtest.ClaimKeys(1, 5)); !errors.Is(err, fault.ErrUnsupported) {
					t.Errorf("%v, want fault.ErrUnsupported", err)
				}
			}
			if err := st.Settle(t.Context(), blob.Ticket{1}, nil); !errors.Is(err, fault.ErrUnsupported) {
				t.Errorf("%v, want fault.ErrUnsupported", err)
			}
			if what != "no lock at all" {
				put(t, st, "data/aa/1", "x")
			}
		})
	}
}

// What it costs a pack of 128 chunks that somebody stores beside another writer.
func BenchmarkClaim(b *testing.B) {
	dir := b.TempDir()
	open := func() *file.Store {
		st, err := file.Open(dir)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { st.Close() })
		return st
	}
	writers := []*file.Store{open(), open()}
	ctx := b.Context()
	used := func() time.Duration {
		var r syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
			b.Fatal(err)
		}
		return time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	begun := used()
	for n := 0; b.Loop(); n++ {
		st := writers[n%2]
		if busy, in, err := st.Claim(ctx, blob.Ticket{1}, blobtest.ClaimKeys(uint32(n), 128)); busy > 0 || len(in) > 0 || err != nil {
			b.Fatal(busy, in, err)
		}
		if err := st.Settle(ctx, blob.Ticket{1}, &[32]byte{1}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64((used()-begun).Microseconds())/float64(b.N), "cpu-µs/pack")
}
