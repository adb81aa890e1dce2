package main_test

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/backstay/backstay/internal/smb/smbtest"
	sim "github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// hasSamba says whether a script may have a host whose files a Samba serves.
func hasSamba() bool {
	_, err := exec.LookPath("smbd")
	if err != nil {
		_, err = os.Stat("/usr/sbin/smbd")
	}
	return os.Getenv("BACKSTAY_MAY_NOT_SKIP") != "" || err == nil && os.Geteuid() == 0
}

// with is b with what a has besides.
func with[V any](a, b map[string]V) map[string]V {
	maps.Copy(b, a)
	return b
}

// A simulated is the Hyper-V host of one script.
type simulated struct {
	host *host.Host
	vm   string
	seed uint64
}

// hypervCmds are the commands of scripts with a simulated Hyper-V host.
func hypervCmds() map[string]func(*testscript.TestScript, bool, []string) {
	var hosts sync.Map // of *simulated, by the script's directory
	of := func(ts *testscript.TestScript) *simulated {
		h, ok := hosts.Load(ts.Getenv("WORK"))
		if !ok {
			ts.Fatalf("there is no host yet")
		}
		return h.(*simulated)
	}
	number := func(ts *testscript.TestScript, s string) int64 {
		n, err := strconv.ParseInt(s, 10, 64)
		ts.Check(err)
		return n
	}
	return map[string]func(*testscript.TestScript, bool, []string){
		// hyperv VM SIZE: simulates a host with one VM of one disk until the script
		// ends. Where it is, is in the environment: HV is its URL, HV_HOST and
		// HV_QUERY the parts of it, HV_UNPINNED the latter without a fingerprint.
		"hyperv": func(ts *testscript.TestScript, neg bool, args []string) {
			dir := ts.MkAbs("hv")
			samba, err := smbtest.Start(context.Background(), smbtest.Options{Dir: filepath.Join(dir, "C")})
			ts.Check(err)
			ts.Defer(func() { samba.Stop() })
			h, err := host.New(host.Options{Dir: dir})
			ts.Check(err)
			ts.Defer(func() { h.Close() })
			mib, ok := strings.CutSuffix(args[1], "M")
			if !ok {
				ts.Fatalf("%s: want a size as 16M", args[1])
			}
			_, err = h.AddVM(host.Spec{Name: args[0], Disks: []host.DiskSpec{{Bytes: number(ts, mib) << 20}}})
			ts.Check(err)
			e, err := sim.Serve(h, "HV01", sim.Options{User: smbtest.User, Password: smbtest.Password})
			ts.Check(err)
			ts.Defer(func() { e.Close() })
			u, err := url.Parse(e.URL)
			ts.Check(err)
			at := smbtest.User + "@" + u.Host
			query := fmt.Sprintf(`smb=%s&share=C:\=%s`, samba.Addr(), smbtest.Share)
			ts.Setenv("HV_PASSWORD", smbtest.Password)
			ts.Setenv("HV_HOST", at)
			ts.Setenv("HV_UNPINNED", query)
			ts.Setenv("HV_QUERY", query+"&fingerprint=sha256:"+e.Fingerprint)
			ts.Setenv("HV", at+"?"+query+"&fingerprint=sha256:"+e.Fingerprint)
			hosts.Store(ts.Getenv("WORK"), &simulated{host: h, vm: args[0]})
		},
		// hyperv-write OFFSET BYTES: the guest writes, something else each time.
		"hyperv-write": func(ts *testscript.TestScript, neg bool, args []string) {
			h := of(ts)
			h.seed++
			ts.Check(h.host.Write(h.vm, 0, number(ts, args[0]), number(ts, args[1]), h.seed))
		},
		// hyperv-cmp FILE: FILE holds what the guest's disk does.
		"hyperv-cmp": func(ts *testscript.TestScript, neg bool, args []string) {
			h := of(ts)
			got, err := os.ReadFile(ts.MkAbs(args[0]))
			ts.Check(err)
			want := filepath.Join(ts.Getenv("WORK"), "expected.raw")
			f, err := os.Create(want)
			ts.Check(err)
			err = f.Truncate(int64(len(got)))
			if err == nil {
				err = h.host.Expected(h.vm, 0, "", f)
			}
			f.Close()
			ts.Check(err)
			expected, err := os.ReadFile(want)
			ts.Check(err)
			if !bytes.Equal(got, expected) {
				ts.Fatalf("%s is not what the guest has written", args[0])
			}
		},
	}
}
