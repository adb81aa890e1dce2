package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/images"
	"github.com/backstay/backstay/internal/repo"
)

func testApp() (*app, *bytes.Buffer, *bytes.Buffer) {
	var out, err bytes.Buffer
	return &app{stdout: &out, stderr: &err, getenv: func(string) string { return "" }}, &out, &err
}

// Every verb can be learned from its own help.
func TestEveryCommandHasAnExample(t *testing.T) {
	a, _, _ := testApp()
	var walk func(*cobra.Command)
	n := 0
	walk = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "completion" {
			return
		}
		if c.Short == "" {
			t.Errorf("%s has no short help", c.CommandPath())
		}
		if !c.HasSubCommands() || !c.HasParent() {
			n++
			if !strings.Contains(c.Example, "backstay "+strings.TrimPrefix(strings.TrimPrefix(c.CommandPath(), "backstay"), " ")) {
				t.Errorf("%s: its example does not use it: %q", c.CommandPath(), c.Example)
			}
		}
		for _, s := range c.Commands() {
			walk(s)
		}
	}
	walk(a.root())
	if n < 14 {
		t.Errorf("only %d commands were looked at", n)
	}
}

// A flag that takes a secret itself would show it in every process list.
func TestNoFlagTakesASecret(t *testing.T) {
	a, _, _ := testApp()
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		for _, name := range []string{"password", "passphrase", "identity", "key", "secret", "token"} {
			if c.Flag(name) != nil {
				t.Errorf("%s has --%s", c.CommandPath(), name)
			}
		}
		for _, s := range c.Commands() {
			walk(s)
		}
	}
	walk(a.root())
}

func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{
		{"frobnicate"}, {"repo", "frobnicate"}, {"--frobnicate"}, {"repo", "init", "--chunk-size", "3"}, {"repo", "init", "--chunk-size", "x"}, {"repo", "init", "--parity", "much", "--repo", "r"},
		{"backup"}, {"restore"}, {"point", "show"}, {"point", "show", "a/b/c"}, {"point", "delete", "web01"}, {"vm", "list", "nourl"},
		{"image", "info"}, {"backup", "x.raw", "--consistency", "perfect", "--repo", "r"}, {"backup", "gopher://x/y", "--repo", "r"},
		{"restore", "x", "--to", "y.raw", "--variant", "fixed", "--repo", "r"}, {"restore", "x", "--to", "y.vhd", "--variant", "thick", "--repo", "r"},
		{"restore", "x", "--to", "y.qcow2", "--image-compression", "lzma", "--repo", "r"}, {"restore", "x", "--to", "d/", "--variant", "thick", "--repo", "r"},
		{"backup", "kvm:///system/web01", "--format", "raw", "--repo", "r"}, {"backup", "x.raw", "--compression", "best", "--repo", "r"},
		{"point", "list"}, // no repository named
	} {
		a, out, errs := testApp()
		if code := a.run(context.Background(), args); code != exitUsage {
			t.Errorf("%v: exit code %d, want %d\n%s", args, code, exitUsage, errs)
		}
		if out.Len() > 0 {
			t.Errorf("%v: %q on stdout", args, out)
		}
		if !strings.HasPrefix(errs.String(), "backstay: ") || !strings.Contains(errs.String(), "\nhint: ") {
			t.Errorf("%v: no message with a hint: %q", args, errs)
		}
	}
}

// The shell completes what is one of a few words.
func TestCompletion(t *testing.T) {
	for _, c := range []struct{ line, want string }{
		{"backup x.raw --consistency pre", "prefer-application"},
		{"backup x.raw --compression ", "default"},
		{"repo init --parity ", "auto"},
		{"backup x.raw --format vh", "vhdx"},
		{"restore web01 --format q", "qcow2"},
		{"restore web01 --variant f", "fixed"},
		{"restore web01 --image-compression z", "zstd"},
	} {
		a, out, errs := testApp()
		args := append([]string{"__complete"}, strings.Split(c.line, " ")...)
		if code := a.run(context.Background(), args); code != 0 || !strings.Contains(out.String(), c.want) {
			t.Errorf("%s: code %d: %q %q", c.line, code, out, errs)
		}
	}
}

// What can be done about an error depends on whose fault it is.
func TestHintsFollowTheCause(t *testing.T) {
	corrupt := func(object string) error { return fault.Corrupt(object, 7, "it is nonsense") }
	for _, c := range []struct {
		name string
		err  error
		want string
	}{
		{"a pack", corrupt("pack 4f2a91c0"), "repo check --read-data"},
		{"the repository's head", corrupt("repo.json"), "copy of the repository"},
		{"a key", corrupt("keys/0123456789abcdef"), "copy of the repository"},
		{"what a vacuum does", corrupt("outcome/01jd9x0000000000000000000000"), "repo vacuum"},
		{"a record", &repo.RecordError{Name: "01jd9x0000000000000000000000-000000", Err: corrupt("rp/x")}, "point delete 01jd9x0000000000000000000000-000000 --force"},
		{"a record's outcome", &repo.RecordError{Name: "01jd9x0000000000000000000000-000000", Err: corrupt("outcome/01jd9x0000000000000000000000")}, "bring outcome/01jd9x0000000000000000000000 back"},
		{"the source", errors.Join(backup.ErrSource, corrupt("grain table")), "the image that was being backed up"},
		{"a source that is written to", fmt.Errorf("x: %w", images.ErrChanged), "shut its VM down"},
		{"no disk", hypervisor.ErrNoDisk, "--exclude-disk"},
	} {
		h := hints(fmt.Errorf("back up web01: %w", c.err), nil)
		if len(h) != 1 || !strings.Contains(h[0], c.want) {
			t.Errorf("%s: %q, want %q", c.name, h, c.want)
		}
	}
}
