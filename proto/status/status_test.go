package status

import (
	"errors"
	"fmt"
	"testing"
)

func TestKindsSurviveWrapping(t *testing.T) {
	err := fmt.Errorf("open volume: %w", Errorf(Held, "volume %q is held by host-1", "v"))
	if !errors.Is(err, Held) || Of(err) != Held || errors.Is(err, NoSpace) {
		t.Fatalf("kind of %v is %v", err, Of(err))
	}
	if New(OK, "x") != nil || Of(nil) != OK {
		t.Fatal("OK must be no error")
	}
}

func TestEveryKindHasAllItsMappings(t *testing.T) {
	for k := Kind(1); k < kindCount; k++ {
		if k.String() == "" || NBD(k) == 0 || Errno(k) == 0 || Code(k) == 0 {
			t.Errorf("kind %d (%v): nbd %d errno %d grpc %v", k, k, NBD(k), Errno(k), Code(k))
		}
	}
}
