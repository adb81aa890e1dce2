package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/hyperv/recording"
)

func (a *app) hypervCmd() *cobra.Command {
	return noun("hyperv", "record what a Hyper-V host answers, for its simulator and tests", a.hypervRecordCmd())
}

func (a *app) hypervRecordCmd() *cobra.Command {
	o := driverOptions{host: hostCredentials()}
	var out string
	var cycle bool
	cmd := &cobra.Command{
		Use:   "record --out FILE HOST[/NAME]",
		Short: "record a host's answers, without what tells whose it is",
		Long: `Ask a Hyper-V host what a backup asks before it changes anything, and write its
answers to a file that you may send to the project: tests then ask the same of
it. With NAME, that VM is looked at closely. Nothing on the host is changed.

With --cycle it also does what a backup does to the VM NAME, without reading
its disks: a checkpoint (a guest with Windows is told, as by a backup of kind
COPY), which becomes a reference point; a second checkpoint, which is destroyed;
and then the reference point is destroyed, too.

Names of hosts, domains, users, VMs, files and switches, GUIDs, addresses,
serial numbers, notes and every other text become pseudonyms; numbers, times,
and words that each host says stay. Passwords are never in it. The file is text:
look through it before you send it.`,
		Example: `  backstay hyperv record --out hv01.jsonl hyperv://backup@hv01
  backstay hyperv record --out hv01.jsonl hyperv://backup@hv01/test-vm --cycle`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := parseSource(args[0])
			switch {
			case err != nil:
				return err
			case s.kind() != "hyperv":
				return usage("%q is no Hyper-V host: want hyperv://USER@HOST or hyperv://USER@HOST/NAME", args[0])
			case out == "":
				return usage("--out FILE is needed: where the recording goes")
			case cycle && s.vm == "":
				return usage("--cycle needs a VM: want hyperv://USER@HOST/NAME")
			}
			return a.recordHyperV(cmd.Context(), s, o, out, cycle)
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "file to write; one that exists is never overwritten")
	cmd.Flags().BoolVar(&cycle, "cycle", false, "also make and take away checkpoints of the VM, as a backup does")
	addHostFlags(cmd.Flags(), &o.host)
	return cmd
}

func (a *app) recordHyperV(ctx context.Context, s source, o driverOptions, out string, cycle bool) (err error) {
	// First of all, so that nothing is asked in vain.
	f, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return withHint(err, "it is not overwritten; name another file with --out")
	}
	if err != nil {
		return err
	}
	done := false
	defer func() {
		f.Close()
		if !done {
			os.Remove(out)
		}
	}()
	if cycle {
		a.say("on the host: two checkpoints of %s and a reference point are made and taken away again; its guest is asked to hold still as for a backup", s.vm)
	}
	r := &recording.Recorder{}
	o.hyperv.Record = r.Record
	d, err := a.openHyperV(ctx, s, o)
	if err != nil {
		return err
	}
	defer d.Close()
	step := func(name string) {
		r.Step(name)
		a.log().Debug("record", "step", name)
	}
	version, err := d.Survey(ctx, s.vm, step)
	if err == nil && cycle {
		err = d.Rehearse(ctx, s.vm, step)
	}
	failed := err
	switch {
	case errors.Is(failed, fault.ErrNotFound) && s.vm != "":
		return withHint(failed, `run "backstay vm list %s" to see which VMs it has`, s.host)
	case failed != nil && (ctx.Err() != nil || !r.Answered()):
		return failed
	}
	c, err := r.Recording(s.vm, version, "backstay "+Version, time.Now())
	if err != nil {
		return errors.Join(failed, err)
	}
	// A host that we do not understand is the one whose answers are wanted most.
	c.Failed = failed != nil
	if err := errors.Join(c.Write(f), f.Sync(), f.Close()); err != nil {
		return errors.Join(failed, fmt.Errorf("%s: %w", out, err))
	}
	done = true
	if failed != nil {
		a.say("it ended early; what the host answered until then is in %s, and may show why", out)
	}
	return errors.Join(failed, a.printRecording(out, c))
}

func (a *app) printRecording(file string, c *recording.Recording) error {
	if a.json {
		return a.printJSON(struct {
			File string `json:"file"`
			recording.Header
			Exchanges int            `json:"exchanges"`
			Replaced  map[string]int `json:"replaced"`
			Stayed    []string       `json:"stayed"`
		}{file, c.Header, len(c.Exchanges), c.Replaced, c.Stayed})
	}
	fmt.Fprintf(a.stdout, "%s: %d requests with their answers (%s), of %s", file, len(c.Exchanges), strings.Join(c.Method, ", "), c.Date)
	if c.OS != "" {
		fmt.Fprintf(a.stdout, ", Windows %s", c.OS)
	}
	fmt.Fprintln(a.stdout)
	if c.LeftOut > 0 {
		fmt.Fprintf(a.stdout, "  left out, because they are no envelopes that could be judged: %d\n", c.LeftOut)
	}
	if c.Unanswered > 0 {
		fmt.Fprintf(a.stdout, "  without an answer: %d\n", c.Unanswered)
	}
	for _, kind := range recording.Kinds() {
		if n := c.Replaced[kind]; n > 0 {
			fmt.Fprintf(a.stdout, "  %s replaced: %d\n", kind, n)
		}
	}
	fmt.Fprintf(a.stdout, "  what stayed beside numbers, times and the names of classes and properties:\n    %s\n", strings.Join(c.Stayed, " "))
	a.say("look through %s before you send it: it is text, a line for each request", file)
	return nil
}
