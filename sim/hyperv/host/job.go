package host

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// Codes that methods return.
const (
	codeDone        = 0
	codeStarted     = 4096
	codeFailed      = 32768
	codeUnsupported = 32770
	codeParameter   = 32773
	codeInUse       = 32779 // of an import; the same number is codeNoFile of images
	codeState       = 32775
	codeNoFile      = 32779
)

// States of a job.
const (
	jobRunning   = 4
	jobCompleted = 7
	jobException = 10
	jobWarned    = 32768
)

// Effects of a job on an element.
const (
	effectUnknown = 0
	effectCreated = 5
)

const jobsKept = 500

// storageMethods are those whose jobs are Msvm_StorageJobs.
var storageMethods = []string{"CreateVirtualHardDisk", "ResizeVirtualHardDisk"}

// A job is what a method goes on doing after it has answered.
type job struct {
	id       string
	class    string
	name     string
	began    time.Time
	ended    time.Time
	state    int
	failure  error
	affected []affected
}

type affected struct {
	ref    cim.Ref
	effect int
}

type results = map[string]cim.Value

// start has v do work as a job, unless it is busy. Work runs with h locked. The
// answer has the job alone: what results is told by the job's elements later.
func (h *Host) start(v *vm, method string, work func() ([]affected, error)) (results, uint32) {
	if code, ok := h.trouble.Refuse[method]; ok {
		delete(h.trouble.Refuse, method)
		return nil, code
	}
	if h.closed || v != nil && v.busy != nil {
		return nil, codeState
	}
	j := &job{id: newGUID(), class: "Msvm_ConcreteJob", name: method, began: h.o.Now(), state: jobRunning}
	if v != nil {
		v.busy = j
	}
	if slices.Contains(storageMethods, method) {
		j.class = "Msvm_StorageJob"
	}
	if h.jobs = append(h.jobs, j); len(h.jobs) > jobsKept {
		h.jobs = h.jobs[1:]
	}
	h.running.Add(1)
	go func() {
		defer h.running.Done()
		time.Sleep(h.jobTime())
		h.mu.Lock()
		defer h.mu.Unlock()
		var rows []affected
		var err error
		if text, ok := h.trouble.FailJob[method]; ok {
			delete(h.trouble.FailJob, method)
			err = fmt.Errorf("%s", text)
		} else {
			rows, err = work()
		}
		j.ended, j.state, j.failure = h.o.Now(), jobCompleted, err
		var warned warnings
		switch {
		case errors.As(err, &warned):
			j.state = jobWarned
		case err != nil:
			j.state = jobException
		}
		if j.state != jobException && !h.trouble.NoAffected {
			j.affected = rows
		}
		if v != nil {
			v.busy = nil
		}
	}()
	return results{"Job": cim.To(j.ref())}, codeStarted
}

func (h *Host) jobTime() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.o.JobTime + h.trouble.SlowJobs
}

func (j *job) ref() cim.Ref {
	return cim.Ref{Namespace: cim.Virtualization, Class: j.class, Keys: map[string]string{"InstanceID": j.id}}
}

func (h *Host) jobInstance(j *job) *cim.Instance {
	i := cim.New(cim.Virtualization, j.class).
		Put("InstanceID", cim.Text(j.id)).Put("Name", cim.Text(j.name)).Put("Caption", cim.Text(j.name)).Put("ElementName", cim.Text(j.name)).
		Put("JobState", cim.Number(j.state)).Put("StartTime", cim.Text(j.began.UTC().Format(time.RFC3339))).
		Put("DeleteOnCompletion", cim.Bool(false)).Put("ErrorCode", cim.Text("0"))
	percent, until := 50, h.o.Now()
	if j.state != jobRunning {
		percent, until = 100, j.ended
	}
	seconds := int(until.Sub(j.began).Seconds())
	i.Put("PercentComplete", cim.Number(percent)).Put("ElapsedTime", cim.Text(fmt.Sprintf("%08d%02d%02d%02d.000000:000", seconds/86400, seconds/3600%24, seconds/60%60, seconds%60)))
	if j.failure != nil && j.state == jobException {
		i.Put("ErrorCode", cim.Number(codeFailed)).Put("ErrorDescription", cim.Text(j.failure.Error())).Put("ErrorSummaryDescription", cim.Text(j.failure.Error())).
			Put("OperationalStatus", cim.List("6")).Put("JobStatus", cim.Text("Exception"))
	}
	return i
}

// errors are the Msvm_Errors of a job.
func (j *job) errors() []string {
	if j.failure == nil {
		return nil
	}
	var list problems
	var warned warnings
	var one problem
	switch {
	case errors.As(j.failure, &warned):
		list = warned.problems
	case errors.As(j.failure, &list):
	case errors.As(j.failure, &one):
		list = problems{one}
	default:
		list = problems{{text: j.failure.Error()}}
	}
	var out []string
	for _, p := range list {
		e := cim.New(cim.Virtualization, "Msvm_Error").Put("Message", cim.Text(p.text)).Put("MessageID", cim.Text(cmp.Or(p.id, "32768"))).Put("ErrorType", cim.Text("4")).Put("CIMStatusCode", cim.Text("1")).Put("ErrorSource", cim.Text("Hyper-V"))
		out = append(out, e.Embedded())
	}
	return out
}
