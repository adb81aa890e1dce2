package main_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/smb/smbtest"
	sim "github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/cim"
	"github.com/backstay/backstay/sim/hyperv/host"
	simwsman "github.com/backstay/backstay/sim/hyperv/wsman"
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
	dir  string // of its volumes
	// added is how many further VMs there were made.
	added int

	mu    sync.Mutex
	spoil map[string]func() simwsman.Trouble // requests, by the end of their action
}

// fault spoils a request that a script wants spoilt.
func (h *simulated) fault(action string) simwsman.Trouble {
	h.mu.Lock()
	defer h.mu.Unlock()
	do := h.spoil[action[strings.LastIndexByte(action, '/')+1:]]
	if do == nil {
		return simwsman.None
	}
	return do()
}

// call has the host carry out a method, as its own console would, and waits for
// its job. Of a VM's methods it is that of the script's.
func (h *simulated) call(class, method string, args map[string]cim.Value) {
	for _, i := range h.host.Instances(cim.Virtualization, class) {
		if m, ok := i.Class.Method(method); ok && (class != "Msvm_ComputerSystem" || i.Get("ElementName").String() == h.vm) {
			h.host.Invoke(context.Background(), i, m, args)
			break
		}
	}
	h.settled()
}

// machine names the VM.
func (h *simulated) machine() cim.Value {
	for _, i := range h.host.Instances(cim.Virtualization, "Msvm_ComputerSystem") {
		if i.Get("ElementName").String() == h.vm {
			return cim.To(i.Ref())
		}
	}
	return cim.Value{}
}

// settled waits until no job of the host's goes on.
func (h *simulated) settled() {
	for {
		busy := false
		for _, i := range h.host.Instances(cim.Virtualization, "Msvm_ConcreteJob") {
			busy = busy || i.Get("JobState").Uint() == 4
		}
		if !busy {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// troubles are what a script may ask for, by name.
var troubles = map[string]simwsman.Trouble{"drop": simwsman.Drop, "drop-answer": simwsman.DropAnswer, "401": simwsman.Unauthorized, "html": simwsman.HTML, "503": simwsman.Unavailable}

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
			h, err := host.New(host.Options{Dir: dir, JobTime: time.Millisecond})
			ts.Check(err)
			ts.Defer(func() { h.Close() })
			mib, ok := strings.CutSuffix(args[1], "M")
			if !ok {
				ts.Fatalf("%s: want a size as 16M", args[1])
			}
			_, err = h.AddVM(host.Spec{Name: args[0], Disks: []host.DiskSpec{{Bytes: number(ts, mib) << 20}}})
			ts.Check(err)
			here := &simulated{host: h, vm: args[0], dir: dir, spoil: map[string]func() simwsman.Trouble{}}
			hosts.Store(ts.Getenv("WORK"), here)
			e, err := sim.Serve(h, "HV01", sim.Options{User: smbtest.User, Password: smbtest.Password, Fault: here.fault})
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
			ts.Check(os.WriteFile(ts.MkAbs("ca.pem"), e.Certificate, 0o644))
			old, err := sim.Serve(h, "HV01", sim.Options{User: smbtest.User, Password: smbtest.Password, Expired: true})
			ts.Check(err)
			ts.Defer(func() { old.Close() })
			u, err = url.Parse(old.URL)
			ts.Check(err)
			ts.Check(os.WriteFile(ts.MkAbs("expired.pem"), old.Certificate, 0o644))
			ts.Setenv("HV_EXPIRED", smbtest.User+"@"+u.Host)
		},
		// hyperv-trouble WHAT [ARG…]: what goes wrong from now on; nothing without
		// WHAT.
		"hyperv-trouble": func(ts *testscript.TestScript, neg bool, args []string) {
			h := of(ts)
			h.mu.Lock()
			defer h.mu.Unlock()
			clear(h.spoil)
			h.host.SetTrouble(func(t *host.Trouble) {
				*t = host.Trouble{}
				if len(args) == 0 {
					return
				}
				switch what := args[0]; what {
				case "request": // ACTION TROUBLE TIMES, or 0 for ever
					left := int(number(ts, args[3]))
					always := left == 0
					h.spoil[args[1]] = func() simwsman.Trouble {
						if left--; left < 0 && !always {
							return simwsman.None
						}
						return troubles[args[2]]
					}
				case "fail-job": // METHOD TEXT
					t.FailJob = map[string]string{args[1]: args[2]}
				case "unequal-arrays":
					t.UnequalArrays = true
				case "short-answers":
					t.ShortAnswers = 1 << 20
				case "lose-tracking":
					go h.host.LoseTracking()
				case "delete-vm": // when ACTION is asked for
					h.spoil[args[1]] = sync.OnceValue(func() simwsman.Trouble {
						vm := h.machine()
						h.call("Msvm_ComputerSystem", "RequestStateChange", map[string]cim.Value{"RequestedState": cim.Text("3")})
						h.call("Msvm_VirtualSystemManagementService", "DestroySystem", map[string]cim.Value{"AffectedSystem": vm})
						return simwsman.None
					})
				default:
					ts.Fatalf("no trouble %s", what)
				}
			})
		},
		// hyperv-add NAME: a further VM of that name.
		"hyperv-add": func(ts *testscript.TestScript, neg bool, args []string) {
			h := of(ts)
			h.added++
			_, err := h.host.AddVM(host.Spec{Name: args[0], Disks: []host.DiskSpec{{Path: fmt.Sprintf(`C:\VMs\more\%d.vhdx`, h.added), Bytes: 4 << 20}}})
			ts.Check(err)
		},
		// hyperv-tidy N: nothing of a backup is left on the host but N reference
		// points.
		"hyperv-tidy": func(ts *testscript.TestScript, neg bool, args []string) {
			h := of(ts)
			for _, i := range h.host.Instances(cim.Virtualization, "Msvm_VirtualSystemSettingData") {
				if i.Get("VirtualSystemType").String() == "Microsoft:Hyper-V:Snapshot:Recovery" {
					ts.Fatalf("the host has the checkpoint %s", i.Get("ElementName"))
				}
			}
			if got := len(h.host.Instances(cim.Virtualization, "Msvm_VirtualSystemReferencePoint")); got != int(number(ts, args[0])) {
				ts.Fatalf("the host has %d reference points, want %s", got, args[0])
			}
			ts.Check(filepath.WalkDir(h.dir, func(file string, _ fs.DirEntry, err error) error {
				if strings.HasSuffix(file, ".avhdx") {
					return fmt.Errorf("the host has %s", file)
				}
				return err
			}))
		},
		// hyperv-write OFFSET BYTES: the guest writes, something else each time.
		"hyperv-write": func(ts *testscript.TestScript, neg bool, args []string) {
			h := of(ts)
			h.seed++
			ts.Check(h.host.Write(h.vm, 0, number(ts, args[0]), number(ts, args[1]), h.seed))
		},
		// hyperv-disk FILE PATH: copies a disk that lies on the host, as raw.
		"hyperv-disk": func(ts *testscript.TestScript, neg bool, args []string) {
			ts.Check(rawOf(of(ts).host.Local(args[1]), ts.MkAbs(args[0])))
		},
		// hyperv-state VM STATE: a VM of the host is "running", "off" or "none".
		"hyperv-state": func(ts *testscript.TestScript, neg bool, args []string) {
			if got := of(ts).host.State(args[0]); got != args[1] {
				ts.Fatalf("%s is %s", args[0], got)
			}
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

// rawOf writes the disk in a VHDX to a file of its own.
func rawOf(vhdxFile, to string) error {
	f, err := image.OpenFile(vhdxFile)
	if err != nil {
		return err
	}
	img, err := vhdx.Open(f, nil)
	if err != nil {
		f.Close()
		return err
	}
	defer img.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, io.NewSectionReader(img, 0, img.Size()))
	return errors.Join(err, out.Close())
}
