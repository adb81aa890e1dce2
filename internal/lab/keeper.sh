# Makes the lab's mount namespace, says so, and waits for its standard input to
# end, which it does when the process that started the lab is gone, however
# that came. Then whatever still runs is ended by the ids it left.
#
# Arguments: the lab's directory, and "kvm" or "tcg". Run by "unshare --mount", so nothing that is
# mounted here is seen outside.
dir=$1
for name in etc run cache log qemu; do
	mkdir -p "$dir/$name"
	chmod 755 "$dir/$name"
done
mkdir -p /etc/libvirt /run/libvirt /var/cache/libvirt /var/log/libvirt
mount --bind "$dir/etc" /etc/libvirt &&
	mount --bind "$dir/run" /run/libvirt &&
	mount --bind "$dir/cache" /var/cache/libvirt &&
	mount --bind "$dir/log" /var/log/libvirt || exit 1
# What libvirt keeps by the names of VMs, so that two labs may use one name.
# NVRAM stays where the machine has it, since a backup reads it from outside.
for name in qemu qemu/nvram; do
	mkdir -p "/var/lib/libvirt/$name" "$dir/$name"
	chown --reference "/var/lib/libvirt/$name" "$dir/$name"
	chmod --reference "/var/lib/libvirt/$name" "$dir/$name"
done
mount --bind /var/lib/libvirt/qemu/nvram "$dir/qemu/nvram" &&
	mount --rbind "$dir/qemu" /var/lib/libvirt/qemu || exit 1
# A /dev/kvm that root can open and QEMU's user cannot makes libvirt ask QEMU
# again and again what it can do, at some seconds each time.
if [ "$2" != kvm ] && [ -e /dev/kvm ]; then
	: >"$dir/no-kvm" && chmod 0 "$dir/no-kvm" && mount --bind "$dir/no-kvm" /dev/kvm || exit 1
fi
# Through D-Bus libvirtd would register its guests with the machine's systemd.
[ -d /run/dbus ] && mount -t tmpfs none /run/dbus
echo ready

# end PIDFILE PROGRAM: only if the id still belongs to such a program.
end() {
	[ -s "$1" ] || return
	pid=$(cat "$1")
	case $(readlink "/proc/$pid/exe") in */"$2"*) kill -9 "$pid" ;; esac
}
read -r _
end "$dir/libvirtd.pid" libvirtd
for file in "$dir"/run/qemu/*.pid; do
	end "$file" qemu-system
done
exit 0
