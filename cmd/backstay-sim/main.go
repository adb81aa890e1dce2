// Command backstay-sim runs simulated hosts of hypervisors that cannot be had
// everywhere, for tests and demonstrations. Nothing of it is in backstay.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := &cobra.Command{Use: "backstay-sim", Short: "Simulated hosts for tests and demonstrations", SilenceUsage: true}
	root.AddCommand(hypervCommand(), demoCommand())
	if err := root.ExecuteContext(ctx); err != nil {
		stop()
		os.Exit(1)
	}
}

type hypervFlags struct {
	listen, dir, user, passwordFile, name, certificate string
	http, noBasic, requireBinding, verbose             bool
	vms, troubles                                      []string
	granule                                            int64
	writes                                             int
}

func hypervCommand() *cobra.Command {
	f := &hypervFlags{}
	c := &cobra.Command{
		Use:   "hyperv --dir DIR --user USER --password-file FILE",
		Short: "A Hyper-V host: WMI over WS-Management, and VHDX files in DIR",
		Long: `A simulated Hyper-V host. It prints its URL and its certificate's fingerprint as
one JSON object, and answers until it is interrupted. The host's C: is DIR/C;
share that directory over SMB for clients that read disks.

--trouble makes something go wrong, once where it is said of the next or of the
Nth, otherwise always:

` + troubleHelp(),
		Example: `  backstay-sim hyperv --dir /tmp/hv --user Administrator --password-file pw --vm web01=64M,1G --guest-writes 20
  backstay-sim hyperv --dir /tmp/hv --password-file pw --vm web01=64M --trouble fail-job=CreateSnapshot --trouble drop=20`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return f.run(c.Context(), c.OutOrStdout(), c.ErrOrStderr()) },
	}
	flags := c.Flags()
	flags.StringVar(&f.listen, "listen", "127.0.0.1:0", "the address to answer on")
	flags.StringVar(&f.dir, "dir", "", "where the host's files lie")
	flags.StringVar(&f.user, "user", "Administrator", "who may come in")
	flags.StringVar(&f.passwordFile, "password-file", "", "the file that holds the password")
	flags.StringVar(&f.name, "name", "HV01", "the host's name")
	flags.StringVar(&f.certificate, "certificate", "", "write the certificate to this file")
	flags.BoolVar(&f.http, "http", false, "answer HTTP with sealed messages instead of HTTPS")
	flags.BoolVar(&f.noBasic, "no-basic", false, "do not let in by Basic")
	flags.BoolVar(&f.requireBinding, "require-binding", false, "demand NTLM's channel binding")
	flags.BoolVar(&f.verbose, "verbose", false, "tell every request on stderr")
	flags.StringArrayVar(&f.vms, "vm", nil, "make a VM: NAME=SIZE,… with a size for each disk; may be repeated")
	flags.StringArrayVar(&f.troubles, "trouble", nil, "what goes wrong: NAME or NAME=VALUE of the list above; may be repeated")
	flags.Int64Var(&f.granule, "granule", 64<<10, "bytes that a bit of change tracking stands for")
	flags.IntVar(&f.writes, "guest-writes", 0, "writes a second of every VM")
	for _, name := range []string{"dir", "password-file"} {
		if err := c.MarkFlagRequired(name); err != nil {
			panic(err)
		}
	}
	return c
}

func (f *hypervFlags) run(ctx context.Context, out, talk io.Writer) error {
	onHost, onWay, err := parseTroubles(f.troubles)
	if err != nil {
		return err
	}
	password, err := os.ReadFile(f.passwordFile)
	if err != nil {
		return err
	}
	h, err := host.New(host.Options{Dir: f.dir, Name: f.name, Granule: f.granule})
	if err != nil {
		return err
	}
	defer h.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	guests := make(chan error, len(f.vms))
	running := 0
	for n, text := range f.vms {
		spec, err := parseVM(text)
		if err != nil {
			return err
		}
		if _, err := h.AddVM(spec); err != nil {
			return fmt.Errorf("VM %s: %w", spec.Name, err)
		}
		if f.writes > 0 {
			running++
			go func() { guests <- h.Guest(ctx, spec.Name, f.writes, uint64(n+1)) }()
		}
	}
	o := hyperv.Options{Listen: f.listen, User: f.user, Password: strings.TrimRight(string(password), "\r\n"), HTTP: f.http, NoBasic: f.noBasic, RequireBinding: f.requireBinding}
	onWay.into(&o)
	h.SetTrouble(func(t *host.Trouble) { *t = onHost })
	if f.verbose {
		o.Log = func(format string, args ...any) { fmt.Fprintf(talk, format+"\n", args...) }
	}
	e, err := hyperv.Serve(h, f.name, o)
	if err != nil {
		return err
	}
	defer e.Close()
	if f.certificate != "" {
		if err := os.WriteFile(f.certificate, e.Certificate, 0o644); err != nil {
			return err
		}
	}
	if err := json.NewEncoder(out).Encode(e); err != nil {
		return err
	}
	select {
	case err := <-guests: // one that cannot write any more
		return err
	case <-ctx.Done():
	}
	for range running {
		err = errors.Join(err, <-guests)
	}
	return err
}

func parseVM(text string) (host.Spec, error) {
	name, sizes, ok := strings.Cut(text, "=")
	if !ok || name == "" {
		return host.Spec{}, fmt.Errorf("%q is not NAME=SIZE,…", text)
	}
	s := host.Spec{Name: name}
	for _, size := range strings.Split(sizes, ",") {
		unit := int64(1)
		if i := strings.IndexAny(size, "KMGT"); i == len(size)-1 && i > 0 {
			unit <<= 10 * (1 + strings.IndexByte("KMGT", size[i]))
			size = size[:i]
		}
		n, err := strconv.ParseInt(size, 10, 64)
		if err != nil || n <= 0 || n > (64<<40)/unit {
			return s, fmt.Errorf("%q is no size of a disk", size)
		}
		s.Disks = append(s.Disks, host.DiskSpec{Bytes: n * unit})
	}
	return s, nil
}
