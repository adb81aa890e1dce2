package kvm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/digitalocean/go-libvirt"
)

// watchdogPatience is how long the watchdog tries to thaw: through a restart
// of libvirt, and not for ever.
const watchdogPatience = 10 * time.Minute

// An order tells the watchdog which VM to thaw, and when.
type order struct {
	URI   string        `json:"uri"`
	UUID  libvirt.UUID  `json:"uuid"`
	Name  string        `json:"name"`
	After time.Duration `json:"after_ns"` // from being armed
}

// Words on the pipes: ours to the watchdog, and its to us.
const (
	wordReady = "ready"  // it is connected to libvirt
	wordArmed = "armed"  // the freeze begins now
	wordStood = "thawed" // go home
)

// A watchdog is the process that thaws the guest if we can't.
type watchdog struct {
	in   io.WriteCloser
	done chan struct{} // closed when the process has ended
}

// startWatchdog starts the process and waits until it could thaw.
func startWatchdog(ctx context.Context, exe string, o order) (*watchdog, error) {
	cmd := exec.Command(exe, WatchdogArg)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no ^C reaches it
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var trouble strings.Builder
	cmd.Stderr = &trouble
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	w := &watchdog{in, make(chan struct{})}
	said := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n')
		said <- strings.TrimSpace(line)
		cmd.Wait()
		close(w.done)
	}()
	if err := json.NewEncoder(in).Encode(o); err != nil {
		w.close()
		return nil, err
	}
	select {
	case word := <-said:
		if word == wordReady {
			return w, nil
		}
		w.close()
		<-w.done
		return nil, fmt.Errorf("it did not start: %q %s", word, strings.TrimSpace(trouble.String()))
	case <-time.After(callTimeout):
		w.close()
		return nil, errors.New("it did not start in time")
	case <-ctx.Done():
		w.close()
		return nil, ctx.Err()
	}
}

func (w *watchdog) arm() error {
	_, err := io.WriteString(w.in, wordArmed+"\n")
	return err
}

// standDown sends the watchdog home. It may be called twice.
func (w *watchdog) standDown() {
	io.WriteString(w.in, wordStood+"\n")
	w.in.Close()
	select {
	case <-w.done:
	case <-time.After(2 * time.Second): // it can't do harm: it has its orders
	}
}

// close lets go of the pipe: an armed watchdog thaws now.
func (w *watchdog) close() { w.in.Close() }

// WatchdogMain is the whole life of the watchdog process: it reads its order,
// says that it is ready, and thaws if the pipe closes or time runs out between
// "armed" and "thawed". It returns the exit code.
func WatchdogMain(in io.Reader, out io.Writer) int {
	// Whatever ends our parent must not end us: the pipe tells us.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	r := bufio.NewReader(in)
	line, err := r.ReadBytes('\n')
	var o order
	if err == nil {
		err = json.Unmarshal(line, &o)
	}
	var uri *url.URL
	if err == nil {
		uri, err = url.Parse(o.URI)
	}
	var d *domain
	if err == nil {
		d = &domain{newConn(uri), o.Name, o.UUID}
		_, err = d.active(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	words := make(chan string)
	go func() {
		defer close(words)
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			words <- strings.TrimSpace(line)
		}
	}()
	fmt.Fprintln(out, wordReady)
	if word := <-words; word != wordArmed {
		return 0 // our parent ended, or thought better of it
	}
	select {
	case word := <-words: // empty when the pipe was closed
		if word == wordStood {
			return 0
		}
	case <-time.After(o.After):
	}
	d.patient = true
	ctx, cancel := context.WithTimeout(context.Background(), watchdogPatience)
	defer cancel()
	if _, err := d.thaw(ctx); err != nil {
		return 1
	}
	return 0
}
