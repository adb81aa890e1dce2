// Package demo shows the main job from end to end on a real guest: it backs a
// running VM up, destroys it, and brings it back, in plain words.
package demo

import (
	"context"
	"fmt"
	"io"
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

// A teller writes down what happens, with the time since the start.
type teller struct {
	out   io.Writer
	start time.Time
}

// chapter begins a part of the story.
func (t *teller) chapter(format string, args ...any) {
	fmt.Fprintf(t.out, "\n== %s  (%s)\n", fmt.Sprintf(format, args...), seconds(time.Since(t.start)))
}

// say is one line of it.
func (t *teller) say(format string, args ...any) {
	fmt.Fprintf(t.out, "   %s\n", fmt.Sprintf(format, args...))
}

// quote is what somebody else said, line by line.
func (t *teller) quote(text string) {
	for line := range strings.Lines(text) {
		if line = strings.TrimRight(line, " \r\n"); line != "" {
			fmt.Fprintf(t.out, "   | %s\n", line)
		}
	}
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }
