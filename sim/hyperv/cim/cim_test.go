package cim_test

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// An embedded instance must have its class's types: hosts answer 32768 to
// others.
func TestEmbeddedInstancesHaveTheTypesOfTheirClass(t *testing.T) {
	wrap := func(inner string) string {
		return `<INSTANCE CLASSNAME="Msvm_VirtualSystemSnapshotSettingData">` + inner + `</INSTANCE>`
	}
	for _, test := range []struct {
		name, text string
		wrong      error
	}{
		{"right", wrap(`<PROPERTY NAME="ConsistencyLevel" TYPE="uint8"><VALUE>1</VALUE></PROPERTY>`), nil},
		{"a wider type", wrap(`<PROPERTY NAME="ConsistencyLevel" TYPE="uint16"><VALUE>1</VALUE></PROPERTY>`), cim.ErrType},
		{"a value out of range", wrap(`<PROPERTY NAME="ConsistencyLevel" TYPE="uint8"><VALUE>256</VALUE></PROPERTY>`), cim.ErrType},
		{"a boolean in capitals", wrap(`<PROPERTY NAME="IgnoreNonSnapshottableDisks" TYPE="boolean"><VALUE>TRUE</VALUE></PROPERTY>`), cim.ErrType},
		{"an unknown property", wrap(`<PROPERTY NAME="Colour" TYPE="string"><VALUE>red</VALUE></PROPERTY>`), cim.ErrType},
		{"an array of what is none", wrap(`<PROPERTY.ARRAY NAME="ConsistencyLevel" TYPE="uint8"><VALUE.ARRAY><VALUE>1</VALUE></VALUE.ARRAY></PROPERTY.ARRAY>`), cim.ErrType},
	} {
		i, err := cim.ParseEmbedded(cim.Virtualization, test.text)
		if !errors.Is(err, test.wrong) || err == nil && i.Get("ConsistencyLevel").Uint() != 1 {
			t.Errorf("%s: %v, want %v", test.name, err, test.wrong)
		}
	}
}

func TestEmbeddedInstancesComeBack(t *testing.T) {
	in := cim.New(cim.Virtualization, "Msvm_StorageAllocationSettingData").
		Put("InstanceID", cim.Text(`Microsoft:A\B`)).Put("HostResource", cim.List(`C:\a & <b>.vhdx`, "")).Put("Limit", cim.Text("7")).Put("IgnoreFlushes", cim.Bool(true))
	out, err := cim.ParseEmbedded(cim.Virtualization, in.Embedded())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range in.Class.Properties {
		if !reflect.DeepEqual(in.Get(f.Name), out.Get(f.Name)) {
			t.Errorf("%s: %v, was %v", f.Name, out.Get(f.Name), in.Get(f.Name))
		}
	}
}

func TestObjectPathsComeBack(t *testing.T) {
	in := cim.Ref{Namespace: cim.Virtualization, Class: "Msvm_ResourceAllocationSettingData", Keys: map[string]string{"InstanceID": `Microsoft:A\B "c" 'd'`, "Name": "x,y=z"}}
	for _, prefix := range []string{"", `\\HV01\`} {
		out, err := cim.ParsePath(prefix+in.Path(), "")
		if err != nil || !reflect.DeepEqual(in, out) {
			t.Errorf("%+v, %v; the path is %s", out, err, prefix+in.Path())
		}
	}
	for _, wrong := range []string{"", "A", "A.b", `A.b="c`, `A.b="c"d`, `.b="c"`, `A.b=c`} {
		if r, err := cim.ParsePath(wrong, ""); err == nil {
			t.Errorf("%q is %+v", wrong, r)
		}
	}
}

// Every class has its keys, and every reference leads to something that can be
// named: without them no selector finds an instance.
func TestTheTableIsComplete(t *testing.T) {
	for _, namespace := range []string{cim.Virtualization, cim.CIMV2} {
		for _, c := range cim.Classes(namespace) {
			keys, seen := 0, map[string]bool{}
			for _, f := range c.Properties {
				if seen[strings.ToLower(f.Name)] {
					t.Errorf("%s.%s is there twice", c.Name, f.Name)
				}
				seen[strings.ToLower(f.Name)] = true
				if f.Key {
					keys++
				}
			}
			switch c.Name {
			case "Msvm_Error", "Msvm_VirtualSystemSnapshotSettingData", "Msvm_VirtualSystemReferencePointSettingData", "Msvm_VirtualHardDiskState", "Msvm_VssService", "Msvm_KvpExchangeDataItem":
				// only ever embedded in others
			default:
				if keys == 0 && !c.Abstract {
					t.Errorf("%s has no key", c.Name)
				}
			}
		}
	}
}

// Statements, embedded instances and paths come from clients. Whatever they
// say, reading them ends.
func FuzzText(f *testing.F) {
	for _, s := range []string{
		"SELECT * FROM Msvm_ComputerSystem WHERE Name='a' AND EnabledState=2",
		`ASSOCIATORS OF {Msvm_ComputerSystem.Name="a\\b"} WHERE AssocClass=Msvm_SettingsDefineState ResultClass = Msvm_VirtualSystemSettingData`,
		`root\virtualization\v2:Msvm_ComputerSystem.CreationClassName="a",Name="b"`,
		cim.New(cim.Virtualization, "Msvm_VirtualSystemSnapshotSettingData").Put("ConsistencyLevel", cim.Text("1")).Embedded(),
		`<INSTANCE CLASSNAME="Msvm_VirtualSystemSettingData"><PROPERTY.ARRAY NAME="Notes" TYPE="string"><VALUE.ARRAY><VALUE>x</VALUE></VALUE.ARRAY></PROPERTY.ARRAY></INSTANCE>`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if q, err := cim.ParseQuery(cim.Virtualization, s); err == nil {
			q.Run(none{})
		}
		if i, err := cim.ParseEmbedded(cim.Virtualization, s); err == nil {
			if _, err := cim.ParseEmbedded(cim.Virtualization, i.Embedded()); err != nil {
				t.Errorf("what was read is not read again: %v", err)
			}
		}
		if r, err := cim.ParsePath(s, cim.Virtualization); err == nil && !r.Equal(r) {
			t.Errorf("%+v is not itself", r)
		}
	})
}

type none struct{}

func (none) Instances(string, string) []*cim.Instance { return nil }
