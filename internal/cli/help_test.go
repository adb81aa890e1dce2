package cli

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/spf13/cobra"
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
		{"frobnicate"}, {"repo", "frobnicate"}, {"--frobnicate"}, {"repo", "init", "--chunk-size", "3"}, {"repo", "init", "--chunk-size", "x"},
		{"backup"}, {"restore"}, {"point", "show"}, {"point", "show", "a/b/c"}, {"point", "delete", "web01"}, {"vm", "list", "nourl"},
		{"image", "info"}, {"backup", "x.raw", "--consistency", "perfect", "--repo", "r"}, {"backup", "gopher://x/y", "--repo", "r"},
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
