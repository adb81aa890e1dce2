package wsman

import (
	"context"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

type nothing struct{}

func (nothing) Instances(_, class string) []*cim.Instance {
	if class != "Msvm_VirtualSystemSnapshotService" {
		return nil
	}
	return []*cim.Instance{cim.New(cim.Virtualization, class)}
}

func (nothing) Invoke(context.Context, *cim.Instance, cim.Method, map[string]cim.Value) (map[string]cim.Value, uint32, error) {
	return nil, 0, nil
}

func (nothing) Put(old, _ *cim.Instance) error { return NotSupported(old.Class.Name) }

// Envelopes come from the network. Whatever they say, each has an answer.
func FuzzEnvelope(f *testing.F) {
	const service = wmiURI + "root/virtualization/v2/Msvm_VirtualSystemSnapshotService"
	head := `<s:Envelope xmlns:s="` + nsSOAP + `" xmlns:a="` + nsAddress + `" xmlns:w="` + nsWSMan + `" xmlns:n="` + nsEnum + `"><s:Header><a:Action>`
	rest := `</a:Action><a:To>x</a:To><a:MessageID>uuid:1</a:MessageID><a:ReplyTo/><w:ResourceURI>` + service + `</w:ResourceURI><w:OperationTimeout>PT1H2M3.5S</w:OperationTimeout>`
	selectors := `<w:SelectorSet><w:Selector Name="CreationClassName">Msvm_VirtualSystemSnapshotService</w:Selector></w:SelectorSet></s:Header><s:Body>`
	f.Add(head + nsTransfer + "/Get" + rest + selectors + "</s:Body></s:Envelope>")
	f.Add(head + nsEnum + "/Enumerate" + rest + "</s:Header><s:Body><n:Enumerate><w:MaxElements>3</w:MaxElements></n:Enumerate></s:Body></s:Envelope>")
	f.Add(head + service + "/CreateSnapshot" + rest + selectors + `<p:CreateSnapshot_INPUT xmlns:p="` + service + `"><p:SnapshotType>2</p:SnapshotType><p:AffectedSystem><a:Address/><a:ReferenceParameters><w:ResourceURI>` + service + `</w:ResourceURI><w:SelectorSet/></a:ReferenceParameters></p:AffectedSystem></p:CreateSnapshot_INPUT></s:Body></s:Envelope>`)
	s := &Server{Provider: nothing{}, Now: time.Now, enumerations: enumerations{open: map[string]*enumeration{}}}
	f.Fuzz(func(t *testing.T, envelope string) {
		w := httptest.NewRecorder()
		status, answer := s.serve(t.Context(), &connection{}, w, []byte(envelope))
		if status != 200 && status != 500 || !strings.HasPrefix(answer, "<s:Envelope") {
			t.Errorf("%d %s", status, answer)
		}
		if _, err := parseXML([]byte(answer)); err != nil {
			t.Errorf("%v: %s", err, answer)
		}
		if _, err := unseal(nil, sealedType, []byte(envelope)); err == nil {
			t.Error("unsealed without a session")
		}
	})
}
