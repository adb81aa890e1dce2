// Package demo shows the main job from end to end on a real guest: it backs a
// running VM up, destroys it, and brings it back, in plain words.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Options are what Run may be told.
type Options struct {
	Dir      string    // all state; "" for a new directory below the temporary one
	Out      io.Writer // what happens, for people
	Backstay string    // the program that does the work, as people would call it
}

// Run shows the demo. It needs Linux on amd64, root, libvirt, QEMU, and Go for
// the guest's own program. Whatever comes, nothing that it started runs on, and
// its directory goes; only the downloaded guest stays in the user's cache.
func Run(ctx context.Context, o Options) error {
	if err := run(ctx, o); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	return nil
}

// A Teller writes down what happens, with the time since the start.
type Teller struct {
	Out   io.Writer
	Start time.Time
}

// Chapter begins a part of the story.
func (t *Teller) Chapter(format string, args ...any) {
	fmt.Fprintf(t.Out, "\n== %s  (%s)\n", fmt.Sprintf(format, args...), Seconds(time.Since(t.Start)))
}

// Say is one line of it.
func (t *Teller) Say(format string, args ...any) {
	fmt.Fprintf(t.Out, "   %s\n", fmt.Sprintf(format, args...))
}

// Quote is what somebody else said, line by line.
func (t *Teller) Quote(text string) {
	for line := range strings.Lines(text) {
		if line = strings.TrimRight(line, " \r\n"); line != "" {
			fmt.Fprintf(t.Out, "   | %s\n", line)
		}
	}
}

// exitWarnings is the exit code of a command that did its work and had
// something to say about it.
const exitWarnings = 4

// A Command is one that people would type.
type Command struct {
	Program string // file of backstay
	Args    []string
	Shown   []string // of Args, as they are shown; nil for the same
	Hidden  []string // further arguments, of no matter to the story
	Env     []string // beside our own
}

// Run runs a command, shows it as people would type it, and what it printed.
// ^C reaches it once, from here, with time to clean up the host.
func (t *Teller) Run(ctx context.Context, c Command) error {
	if c.Shown == nil {
		c.Shown = Quoted(c.Args)
	}
	fmt.Fprintf(t.Out, "\n   $ backstay %s\n", strings.Join(c.Shown, " "))
	cmd := exec.CommandContext(ctx, c.Program, append(slices.Clone(c.Args), c.Hidden...)...)
	cmd.Env = append(os.Environ(), c.Env...)
	apart(cmd)
	cmd.WaitDelay = 30 * time.Second
	start := time.Now()
	out, err := cmd.CombinedOutput()
	t.Quote(string(out))
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == exitWarnings {
		err = nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("backstay %s: %w", strings.Join(c.Args, " "), err)
	}
	t.Say("%s", Seconds(time.Since(start)))
	return nil
}

var plain = regexp.MustCompile(`^[A-Za-z0-9_./:=,@%+-]+$`)

// Quoted writes args so that a shell would read them back.
func Quoted(args []string) []string {
	out := make([]string, len(args))
	for i, a := range args {
		if !plain.MatchString(a) {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		out[i] = a
	}
	return out
}

// Seconds writes a duration.
func Seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }
