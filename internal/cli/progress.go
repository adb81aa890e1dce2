package cli

import (
	"fmt"
	"sync"
	"time"

	"github.com/cheggaaa/pb/v3"
)

// Work that is done sooner than this needs no bar.
const barAfter = 2 * time.Second

// A bar shows how far a piece of work has come: done and total bytes, rate and
// time left. It draws on a terminal only, and only when the work lasts. All
// methods are safe for concurrent use; several pieces of work add up in one
// bar.
type bar struct {
	app *app

	mu    sync.Mutex
	pb    *pb.ProgressBar
	timer *time.Timer
	total int64
	done  int64
	ended bool
	label string
}

// newBar makes a bar; label says in a word or two what is going on.
func (a *app) newBar(label string) *bar {
	b := &bar{app: a, label: label}
	if !a.quiet && a.onTerminal() {
		b.timer = time.AfterFunc(barAfter, b.show)
	}
	return b
}

func (b *bar) show() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		return
	}
	const tmpl = `{{string . "label"}} {{counters . }} {{bar . "[" "=" ">" " " "]"}} {{percent . }} {{speed . "%s/s" "…"}} {{rtime . "%s left" "" ""}}`
	b.pb = pb.ProgressBarTemplate(tmpl).New(0)
	b.pb.Set(pb.Bytes, true).Set("label", b.label)
	b.pb.SetWriter(b.app.stderr).SetTotal(b.total).SetCurrent(b.done)
	b.pb.Start()
}

// addTotal says that there are n more bytes to do.
func (b *bar) addTotal(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.total += n
	if b.pb != nil {
		b.pb.SetTotal(b.total)
	}
}

// add says that n more bytes are done.
func (b *bar) add(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done += n
	if b.pb != nil {
		b.pb.SetCurrent(b.done)
	}
}

// set says how many bytes of how many are done.
func (b *bar) set(done, total int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done, b.total = done, total
	if b.pb != nil {
		b.pb.SetTotal(total).SetCurrent(done)
	}
}

// end takes the bar off the screen. It may be called twice.
func (b *bar) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
	if b.timer != nil {
		b.timer.Stop()
	}
	if b.pb != nil {
		b.pb.Finish()
		fmt.Fprint(b.app.stderr, "\x1b[1A\x1b[2K") // the finished bar's line
		b.pb = nil
	}
}
