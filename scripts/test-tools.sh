# What tests need beside Python: Debian's docker-registry and its readers skopeo and umoci, and zsh.

test_tools=(docker-registry skopeo umoci zsh)

missing_test_tools() {
    local tool
    for tool in "${test_tools[@]}"; do
        command -v "$tool" >/dev/null || echo "$tool"
    done
}

# find_test_tools: installs what is missing as root, unpacks it into .apt/ otherwise; without apt says what to do.
find_test_tools() {
    export PATH="$PWD/.apt/usr/bin:$PATH"
    [ -z "$(missing_test_tools)" ] && return
    if ! command -v apt-get >/dev/null; then
        echo "note: without $(missing_test_tools | xargs) their tests are skipped (CI=true: they fail)" >&2
        return
    fi
    echo "── installing $(missing_test_tools | xargs)" >&2
    if [ "$(id -u)" = 0 ]; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${test_tools[@]}" >/dev/null
    else
        unpack_test_tools || true
    fi
    if [ -n "$(missing_test_tools)" ]; then
        echo "note: for all tests run: sudo apt-get install $(missing_test_tools | xargs)" >&2
    fi
}

# Without root: the packages and the libraries that the machine lacks, unpacked beside the project.
unpack_test_tools() {
    mkdir -p .apt/packages
    local libraries
    libraries=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
        --no-enhances "${test_tools[@]}" 2>/dev/null | grep -E '^lib(gpgme|assuan|devmapper|gpg-error)' | sort -u)
    # zsh looks for modules and functions below /usr: the static one has its modules in it, and is told of its functions.
    # shellcheck disable=SC2086  # a list of package names
    (cd .apt/packages && apt-get download -qq "${test_tools[@]/%zsh/zsh-static}" zsh-common $libraries)
    local package
    for package in .apt/packages/*.deb; do
        dpkg-deb --extract "$package" .apt
    done
    if ! command -v zsh >/dev/null; then
        ln -sf zsh-static .apt/bin/zsh # a completion asks what the shell is called
        printf '#!/bin/sh\nFPATH=%s exec %s/.apt/bin/zsh "$@"\n' \
            "$(find "$PWD/.apt/usr/share/zsh/functions" -type d | paste -sd:)" "$PWD" >.apt/usr/bin/zsh
        chmod +x .apt/usr/bin/zsh
    fi
    export LD_LIBRARY_PATH="$PWD/.apt/usr/lib/$(uname -m)-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
}
